"""What was seen to be done to tensors and parameters, in all and while one module was made over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cpe_daemon.core.rectangles import Rectangle
from inference_plugins.learned.benches import Form
from inference_plugins.learned.provenance import Scratch


class Move(NamedTuple):
    """Bytes of a tensor and where they belong: ``rectangle``'s destination counts from the parameter's beginning."""

    parameter: str
    rectangle: Rectangle
    bench: bool = False
    """Whether that is the parameter as it is on its module's bench."""


@dataclass
class Record:
    """Of tensors by name, and of parameters by name."""

    moves: dict[str, list[Move]] = field(default_factory=dict)
    """By tensor: where its bytes were copied to."""
    trouble: dict[str, str] = field(default_factory=dict)
    """By tensor: what else than copies became of it."""
    spoilt: dict[str, str] = field(default_factory=dict)
    """By parameter: what else than copies was done to it."""
    reached: dict[str, set[str]] = field(default_factory=dict)
    """By tensor: the parameters that it had a part in."""
    unseen: set[str] = field(default_factory=set)
    """Parameters that bytes were copied to of which it was not seen how they came about."""

    def take(self, other: Record) -> None:
        """Add another's, which is of what was done later."""
        for tensor, moves in other.moves.items():
            self.moves.setdefault(tensor, []).extend(moves)
        for tensor, parameters in other.reached.items():
            self.reached.setdefault(tensor, set()).update(parameters)
        self.trouble = other.trouble | self.trouble
        self.spoilt = other.spoilt | self.spoilt
        self.unseen |= other.unseen


@dataclass
class Making:
    """A module that is being made over.

    Attributes:
        module: its name.
        forms: of its bench's tensors, by name.
        record: what is done to tensors and parameters from when the bench was filled on.
        loaded: what came to the bench.
        reason: why that cannot be copied there; "" if it can.
        scratch: the bench's memory.
        before: all memory that the loader had made when the bench was filled.
    """

    module: str
    forms: Mapping[str, Form]
    record: Record = field(default_factory=Record)
    loaded: Record = field(default_factory=Record)
    reason: str = ""
    scratch: list[Scratch] = field(default_factory=list)
    before: list[Scratch] = field(default_factory=list)

    def add(self, parameter: str, scratch: Scratch, nbytes: int) -> None:
        """Note what is in one of the bench's tensors, all of whose ``nbytes`` have to be tensors'."""
        for tensor in scratch.names:
            self.loaded.reached.setdefault(tensor, set()).add(parameter)
        for tensor, rectangle in scratch.pieces:
            self.loaded.moves.setdefault(tensor, []).append(Move(parameter, rectangle, bench=True))
        if sum(rectangle.total_bytes for _, rectangle in scratch.pieces) != nbytes:
            self.reason = self.reason or "not whole"
        self.reason = self.reason or scratch.spoilt

    @property
    def copied(self) -> bool:
        """Whether all was copied, and nothing else was done: no bench is needed."""
        done = self.record
        return not (done.trouble or done.spoilt or done.unseen) and self.loaded.moves.keys() <= done.moves.keys()

    def reaches_beyond(self, module_of: Callable[[str], str]) -> bool:
        """Whether anything but this module's tensors and parameters was used, or written to."""
        done = self.record
        parameters = {*done.spoilt, *done.unseen, *(name for names in done.reached.values() for name in names)}
        tensors = {*done.trouble, *done.moves}
        return not tensors <= self.loaded.reached.keys() or any(module_of(name) != self.module for name in parameters)

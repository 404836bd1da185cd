"""What was learned of each tensor, and which of it may be used: whole modules, or nothing of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cpe_daemon.core.rectangles import Rectangle, overlap
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.wire.reports import LoadingReport
from inference_plugins.assembly import Place, Placement
from inference_plugins.learned.benches import Form
from inference_plugins.learned.provenance import Span
from inference_plugins.learned.record import Move

OTHER_BYTES: Final = "other bytes"
"""The reason of what looked like a copy and was none."""

_MOST_REASONS: Final = 16
_MOST_REASON_CHARS: Final = 80
"""What the daemon is told of a reason."""
_MOST_ROWS: Final = 1 << 17
"""Of a parameter that is written in part: there is no telling of more what is around them."""


class Run(NamedTuple):
    """Bytes of a parameter."""

    parameter: str
    start: int
    nbytes: int


@dataclass
class Entry:
    """One tensor, as the loader was seen to treat it."""

    spec: TensorSpec
    moves: list[Move]
    """Where its bytes go: all of what the loader does with it, unless there is a reason."""
    reason: str = ""
    """Why that is not a plain copy; "" if it is."""
    reached: frozenset[str] = frozenset()
    """The parameters that it has a part in."""
    proven: bool = False
    """Whether bytes that would show another order were seen at all of these places."""
    digest: int | None = None
    """Of the bytes that came last, as far as they were looked at."""

    @property
    def benched(self) -> bool:
        """Whether any of its bytes go to a bench."""
        return any(move.bench for move in self.moves)


@dataclass(frozen=True)
class Report:
    """How many tensors of a version are loaded in which way; ``digest`` tells tables apart that are used."""

    learned: int = 0
    unproven: int = 0
    """Known, and not used before other contents were seen to arrive, or not all of their module are."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Left to the engine's loader: how many, by reason."""
    digest: str = ""
    made_over: int = 0
    """Those of the learned ones that are copied to benches, of which the engine then makes other tensors."""

    def as_message(self) -> LoadingReport:
        """The same, for the daemon: with the most frequent reasons only."""
        frequent = sorted(self.kept.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REASONS]
        return LoadingReport(self.learned, self.unproven, {_short(why): count for why, count in frequent}, self.digest)

    def __str__(self) -> str:
        kept = ", ".join(f"{count} {reason}" for reason, count in sorted(self.kept.items()))
        made_over = f" ({self.made_over} to be made over)" if self.made_over else ""
        return f"{self.learned} learned{made_over}, {self.unproven} unproven, {sum(self.kept.values())} kept" + (
            f" ({kept})" if kept else ""
        )


def _short(reason: str) -> str:
    return reason if len(reason) <= _MOST_REASON_CHARS else f"{reason[: _MOST_REASON_CHARS - 1]}…"


class Table:
    """All tensors of a version."""

    def __init__(self, module_of: Callable[[str], str]) -> None:
        self.entries: dict[str, Entry] = {}
        self.spoilt: dict[str, str] = {}
        """Parameters that something else than copies is done to."""
        self.around: list[Run] = []
        """All bytes of parameters that were not seen to be written, but of those that are spoilt."""
        self.together: list[set[str]] = []
        """Tensors that have to be loaded together."""
        self.benches: dict[str, Mapping[str, Form]] = {}
        """By module whose tensors are made over from a bench: those of that bench."""
        self._on_bench: dict[str, dict[str, None]] = {}
        self._module_of = module_of

    def fits(self, specs: Collection[TensorSpec]) -> bool:
        """Whether a version of these tensors is what was learned."""
        entries = self.entries
        return len(specs) == len(entries) and all(
            (entry := entries.get(spec.name)) is not None and entry.spec == spec for spec in specs
        )

    def on_bench(self, module: str) -> list[Entry]:
        """Tensors that go to a module's bench of which that is still to be proven."""
        entries = [self.entries[name] for name in self._on_bench.get(module, ())]
        return [entry for entry in entries if not entry.proven and not entry.reason]

    def close(self, parameters: Sequence[Span], unseen: Collection[str]) -> None:
        """All was seen: find the bytes that are written twice, and those that are not.

        Args:
            parameters: all memory that the loader may write to.
            unseen: those that bytes came to nobody knows where from.
        """
        written: dict[str, list[Move]] = {}
        self._on_bench = {}
        for name, entry in self.entries.items():
            for move in entry.moves:
                if move.bench:
                    self._on_bench.setdefault(self._module_of(move.parameter), {})[name] = None
                else:
                    written.setdefault(move.parameter, []).append(move)
        self.around = []
        for begin, end, name in parameters:
            moves = written.get(name, [])
            if overlap([move.rectangle for move in moves]):  # which of them stand depends on the order
                self.spoilt.setdefault(name, "written twice")
            elif sum(move.rectangle.rows for move in moves) > _MOST_ROWS and not _fill(moves, end - begin):
                self.spoilt.setdefault(name, "in too many pieces")
            if self._module_of(name) in self.benches:
                continue  # the engine's own work
            if name in unseen:
                self.around.append(Run(name, 0, end - begin))
            elif name not in self.spoilt and not _fill(moves, end - begin):
                self.around += [Run(name, *run) for run in _between(moves, end - begin)]

    def usable(self, *, quiet: bool) -> tuple[list[Entry], Report]:
        """What may be copied without the loader: tensors all of whose modules come in that way.

        Args:
            quiet: nothing changes but what was seen to be written; otherwise nothing may be used.
        """
        modules = _Sets()
        for name, entry in self.entries.items():
            for parameter in entry.reached:
                modules.join(("", name), ("module", self._module_of(parameter)))
        for names in self.together:
            for name in names:
                modules.join(("", min(names)), ("", name))
        reasons: dict[object, str] = {}
        for parameter, reason in self.spoilt.items():
            reasons.setdefault(modules.of(("module", self._module_of(parameter))), reason)
        unproven = set[object]()
        for name, entry in self.entries.items():
            whole = modules.of(("", name))
            if entry.reason:
                reasons.setdefault(whole, entry.reason)
            elif not entry.proven:
                unproven.add(whole)
        used, waiting, kept = list[Entry](), 0, Counter[str]()
        for name, entry in self.entries.items():
            whole = modules.of(("", name))
            if whole in reasons:
                kept[reasons[whole] if entry.reason in {"", OTHER_BYTES} else entry.reason] += 1
            elif whole in unproven or not quiet:
                waiting += 1
            else:
                used.append(entry)
        made_over = sum(entry.benched for entry in used)
        return used, Report(len(used), waiting, dict(kept), _digest(used), made_over)


def _fill(moves: Sequence[Move], nbytes: int) -> bool:
    """Whether moves that do not overlap leave nothing out."""
    return sum(move.rectangle.total_bytes for move in moves) == nbytes


def _between(moves: Sequence[Move], nbytes: int) -> Iterator[tuple[int, int]]:
    """What moves leave out: where it begins, and its size."""
    rows = sorted(
        (rectangle.destination + row * rectangle.destination_pitch, rectangle.nbytes)
        for _, rectangle, _ in moves
        for row in range(rectangle.rows)
    )
    at = 0
    for start, count in [*rows, (nbytes, 0)]:
        if start > at:
            yield at, start - at
        at = start + count


class _Sets:
    """Disjoint sets of things that belong together."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}

    def of(self, thing: object) -> object:
        """What stands for the set that it is in."""
        while (parent := self._parent.get(thing, thing)) != thing:
            self._parent[thing] = self._parent.get(parent, parent)
            thing = parent
        return thing

    def join(self, one: object, other: object) -> None:
        self._parent[self.of(one)] = self.of(other)


def _digest(entries: Iterable[Entry]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for entry in sorted(entries, key=lambda entry: entry.spec.name):
        spec = entry.spec
        digest.update(repr((spec.name, spec.dtype, spec.shape, [(p, tuple(r), b) for p, r, b in entry.moves])).encode())
    return digest.hexdigest()


def placement(rectangles: tuple[Rectangle, ...]) -> Placement:
    """What a receiver is told of a tensor: one run of its bytes if it can be said so."""
    if not rectangles:
        return Place(0, 0)
    if len(rectangles) == 1 and rectangles[0].rows == 1:
        destination, source, nbytes, *_ = rectangles[0]
        return Place(destination, nbytes, source)
    return rectangles

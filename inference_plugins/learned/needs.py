"""Which bytes of a version's tensors this worker needs, as it follows from what was learned of its loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from cpe_daemon.core.needs import Needs, describe
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec
from inference_plugins.assembly import Place, Placement


class Needed(NamedTuple):
    """What is told to the daemon, and the names of the tensors that are not needed whole, as it is said there."""

    told: Needs
    parted: frozenset[str]


class Learned(NamedTuple):
    """A tensor that needs no loader; ``device`` is None for one of which nothing is wanted."""

    spec: TensorSpec
    device: torch.device | None
    place: Placement
    """If it is ``benched``, only whence bytes are copied counts: each round has other benches."""
    benched: bool = False


def needed(all_specs: Iterable[TensorSpec], learned: Mapping[str, Learned], device: torch.device) -> Needed | None:
    """Say what is needed of tensors whose bytes come to the memory of a device.

    Args:
        all_specs: of a version.
        learned: by name, those that need no loader; of the others it is given everything.
        device: where the slots are.

    Returns:
        None if everything is needed of all.
    """
    copied: dict[str, tuple[TensorSpec, tuple[Rectangle, ...] | None]] = {}
    for spec in all_specs:
        known = learned.get(spec.name)
        here = known is not None and known.spec == spec and known.device in (None, device)
        copied[spec.name] = spec, _rectangles(known.place) if known is not None and here else None
    told = describe(copied)
    if told is None:
        return None
    return Needed(told, frozenset(name for name, (_, rectangles) in copied.items() if rectangles is not None))


def _rectangles(place: Placement) -> tuple[Rectangle, ...]:
    if isinstance(place, Place):
        return (Rectangle(place.address, place.start, place.nbytes),)
    return place

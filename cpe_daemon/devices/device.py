"""The Device protocol: what the push pipeline asks of the node's accelerators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cpe_daemon.core.plan import Copy, PeerCopy, Topology
from cpe_daemon.wire.messages import SlotSet


class Device(Protocol):
    """The slots of every GPU of a node, and the two kinds of copies that fill them.

    GPUs are named by their index in ``topology.gpus``. `fetch` and `exchange` may be called for several slots at once;
    each GPU carries them out in the order of the calls, the two kinds beside each other. Cancelled, they end only when
    nothing of theirs is copied any more: to be told to stop is not to have stopped.
    """

    kind: str
    topology: Topology
    slot_count: int
    slot_bytes: int

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copy in flight; 0.0 if there is none. No copy takes long unless something is wrong."""
        ...

    async def open(self) -> None:
        """Allocate the slots."""
        ...

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        """Stage 1: copy from the arena into a slot. Returns when the bytes are there."""
        ...

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """Stage 2: complete a slot from the same slot of other GPUs. Returns when the bytes are there."""
        ...

    def export(self, gpu: int, on_gone: Callable[[], None]) -> SlotSet:
        """Return what a worker needs to open a GPU's slots; ``on_gone`` is called when its process lets go or dies."""
        ...

    def withdraw(self, slots: SlotSet) -> None:
        """Take back what `export` gave, if the worker never opened it."""
        ...

    async def close(self) -> None:
        """Free the slots."""
        ...

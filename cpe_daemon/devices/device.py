"""The Device protocol: what the push pipeline asks of the node's accelerators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cpe_daemon.core.plan import Copy, PeerCopy, Topology
from cpe_daemon.errors import CpeError
from cpe_daemon.wire.messages import SlotSet


class Device(Protocol):
    """The slots of every GPU of a node, and the two kinds of copies that fill them. Belongs to the event loop.

    GPUs are named by their index in ``topology.gpus``. A GPU has slots from `take` to `release`, and `export` tells a
    worker how to open them. `fetch` and `exchange` may be called for several slots at once; each GPU carries them out
    in the order of the calls, the two kinds beside each other. Cancelled, they end only when nothing of theirs is
    copied any more: to be told to stop is not to have stopped.
    """

    kind: str
    topology: Topology
    slot_bytes: int

    @property
    def slot_count(self) -> int:
        """Slots that each GPU has which has any; 0 if none has."""
        ...

    @property
    def failures(self) -> Mapping[int, CpeError]:
        """GPUs that are of no use any more in this process, and why."""
        ...

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copy in flight; 0.0 if there is none. No copy takes long unless something is wrong."""
        ...

    async def open(self, progress: Callable[[int, int], None]) -> None:
        """Make the arena ready to be copied from.

        Args:
            progress: called on the loop with (bytes done, bytes in all).

        Raises:
            ResourceError: it cannot be, now; says what to do.
        """
        ...

    def slots(self, gpu: int) -> int:
        """How many slots a GPU has."""
        ...

    async def take(self, gpu: int, count: int) -> None:
        """Give a GPU that has no slots ``count`` of them, or as many as there is memory for.

        Raises:
            ResourceError: there is no memory for one; says what to do.
        """
        ...

    def export(self, gpu: int) -> SlotSet:
        """Return what one worker needs to open a GPU's slots."""
        ...

    def withdraw(self, slots: SlotSet) -> None:
        """Take back what `export` gave, if the worker never opened it."""
        ...

    async def release(self, gpu: int) -> None:
        """Free a GPU's slots. No copy may be in flight there, and no worker may have them open."""
        ...

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        """Stage 1: copy from the arena into a slot. Returns when the bytes are there."""
        ...

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """Stage 2: complete a slot from the same slot of other GPUs. Returns when the bytes are there.

        May be called as soon as `fetch` was, for those GPUs and that slot: it waits for what they fetch.
        """
        ...

    async def close(self) -> None:
        """Free everything; workers' mappings of shared memory live on until they let go."""
        ...

"""The worker's half of a device: open a GPU's slots once, and see them as torch tensors."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch

from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import PeerError
from cpe_daemon.links.handoff import Tether, claim
from cpe_daemon.wire.messages import SlotSet


class Slots(Protocol):
    """A GPU's slots in an engine worker. Owned by the worker's thread."""

    def slot(self, index: int) -> torch.Tensor:
        """Return slot ``index`` as uint8 ``[slot_bytes]``; valid until the bucket in it is acknowledged."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the daemon that owns the slots has ended."""
        ...

    def close(self) -> None:
        """Let the slots go; no tensor of `slot` may be used afterwards."""
        ...


def open_slots(slots: SlotSet, handoff: str) -> Slots:
    """Open the slots that a daemon's welcome describes.

    Args:
        slots: from the welcome.
        handoff: path of the daemon's hand-off socket.

    Raises:
        PeerError: the daemon's device is not known here, or does not hand its memory over.
    """
    if slots.kind == "shm":
        return ShmSlots(slots, handoff)
    raise PeerError(f"the daemon's device is {slots.kind!r}, which this release cannot open")


class ShmSlots:
    """Slots in shared memory, mapped read-only: an engine cannot spoil the bytes of its neighbours.

    The tensors look writable to torch; writing to one ends the process. Keeps a tether, by which the daemon learns at
    once that this process is gone.
    """

    def __init__(self, slots: SlotSet, handoff: str) -> None:
        fd, self._tether = self._claim(slots, handoff)
        try:
            self._memory = SharedMemory.attach(fd, slots.count * slots.slot_bytes, writable=False)
        except PeerError:
            self._tether.close()
            raise
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            # A view of its own: who keeps a tensor longer than allowed reads old bytes, and not unmapped memory.
            everything = torch.frombuffer(memoryview(self._memory.view), dtype=torch.uint8)
        self._views: tuple[torch.Tensor, ...] = everything.split(slots.slot_bytes)

    @staticmethod
    def _claim(slots: SlotSet, handoff: str) -> tuple[int, Tether]:
        if len(slots.handles) != 1:
            raise PeerError(f"{len(slots.handles)} handles for the slots of {slots.gpu}; shm has one")
        return claim(handoff, slots.handles[0])

    def slot(self, index: int) -> torch.Tensor:
        """Return slot ``index`` as uint8 ``[slot_bytes]``."""
        return self._views[index]

    @property
    def lost(self) -> bool:
        """Whether the daemon has ended: its end of the tether is closed."""
        return self._tether.cut

    def close(self) -> None:
        """Unmap, and let go of the tether."""
        self._views = ()
        self._memory.close()
        self._tether.close()

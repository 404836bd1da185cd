"""The worker's half of a device: open a GPU's slots, see them as torch tensors, and copy out of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.devices.memory import SharedMemory, copy
from cpe_daemon.devices.rows import copying
from cpe_daemon.errors import PeerError
from cpe_daemon.links.handoff import claim
from cpe_daemon.wire.messages import SlotSet


class Mark(Protocol):
    """A point in what was issued to a device. Owned by the worker's thread."""

    @property
    def reached(self) -> bool:
        """Whether everything issued before it has been done, or never will be: `wait` does not take long then."""
        ...

    def wait(self) -> None:
        """Wait until everything issued before it has been done.

        Raises:
            RuntimeError: the device failed.
        """
        ...


Replay = Callable[[int], None]
"""Copies, or issues copies of, all that was prepared, out of the slot that begins at an address."""


class Slots(Protocol):
    """A GPU's slots in an engine worker. Owned by the worker's thread."""

    @property
    def device(self) -> torch.device:
        """Where the slots are, as this process calls it."""
        ...

    def slot(self, index: int) -> torch.Tensor:
        """Return slot ``index`` as uint8 ``[slot_bytes]``; valid until the bucket in it is acknowledged."""
        ...

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Load buckets in this: whatever is issued inside, by torch or by `copy`, is done in that order; see `mark`.

        On a GPU it is the slots' own stream on which it is issued, whatever the thread's device and stream were. If
        something is raised inside, what was issued has been done when it ends.
        """
        ...

    def mark(self) -> Mark:
        """Mark what was issued so far; to be called in `loading`."""
        ...

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copy between two addresses on `device`, or issue that; to be called in `loading`.

        The caller vouches for both ranges until a later `mark` is reached.
        """
        ...

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        """Make ready to copy rectangles as `copy` does, any number of times, as fast as the device does it.

        To be called in `loading`, and so is what it returns, which stays good as long as the destinations do.

        Args:
            rectangles: their sources count from the beginning of a slot, destinations are addresses. Of bytes that are
                written twice the last ones stand.
        """
        ...

    def close(self) -> None:
        """Let the slots go; no tensor of `slot` may be used afterwards."""
        ...


def open_slots(slots: SlotSet, handoff: str) -> Slots:
    """Open the slots that a daemon describes.

    Args:
        slots: what they are and how to get them.
        handoff: path of the daemon's hand-off socket.

    Raises:
        PeerError: the daemon's device is not known here, or its memory cannot be had.
    """
    if slots.kind == "shm":
        return ShmSlots(slots, handoff)
    if slots.kind == "cuda":
        from cpe_daemon.devices.cuda.slots import CudaSlots  # here, so that a host without GPUs has no part of it

        return CudaSlots(slots)
    raise PeerError(f"the daemon's device is {slots.kind!r}, which this release cannot open")


class Reached:
    """What was asked of a CPU has been done."""

    reached = True

    def wait(self) -> None:
        """Nothing to wait for."""


class ShmSlots:
    """Slots in shared memory, mapped read-only: an engine cannot spoil the bytes of its neighbours.

    The tensors look writable to torch; writing to one ends the process.
    """

    device = torch.device("cpu")

    def __init__(self, slots: SlotSet, handoff: str) -> None:
        if len(slots.handles) != 1:
            raise PeerError(f"{len(slots.handles)} handles for the slots of {slots.gpu}; shm has one")
        fd, tether = claim(handoff, slots.handles[0])
        tether.close()  # the link to the daemon has one of its own
        self._memory = SharedMemory.attach(fd, slots.count * slots.slot_bytes, writable=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            # A view of its own: who keeps a tensor longer than allowed reads old bytes, and not unmapped memory.
            everything = torch.frombuffer(memoryview(self._memory.view), dtype=torch.uint8)
        self._views: tuple[torch.Tensor, ...] = everything.split(slots.slot_bytes)

    def slot(self, index: int) -> torch.Tensor:
        """Return slot ``index`` as uint8 ``[slot_bytes]``."""
        return self._views[index]

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to wait for: on the CPU what has returned has been done."""
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        """Reached already."""
        return Reached()

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copy; releases the GIL."""
        copy(destination, source, nbytes)

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        """Copy one after another."""
        return copying(rectangles)

    def close(self) -> None:
        """Unmap."""
        self._views = ()
        self._memory.close()

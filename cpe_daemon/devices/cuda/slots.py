"""The worker's half: a GPU's slots, opened by their handle and seen as torch tensors."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from cpe_daemon.core.rectangles import Rectangle, overlap
from cpe_daemon.devices.cuda.driver import CudaError, driver
from cpe_daemon.devices.cuda.table import Tables
from cpe_daemon.devices.rows import copy_rows
from cpe_daemon.devices.slots import Mark, Replay
from cpe_daemon.errors import CpeError, PeerError, ResourceError
from cpe_daemon.wire.messages import SlotSet

# Not structlog: engines import this module, and their environments do not have it.
log: Final = logging.getLogger(__name__)

_FEW: Final = 4
"""Copies that cost no more to issue one by one than a table of them."""
_TABLE_ALIGNMENT: Final = 16


class _Mapped:
    """Memory at an address, as torch takes it over without a copy; lives as long as any tensor over it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class _Event:
    """A mark in a stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    @property
    def reached(self) -> bool:
        """Whether the stream has come this far, or its GPU has failed."""
        try:
            return bool(self._event.query())
        except RuntimeError:
            return True  # `wait` says why

    def wait(self) -> None:
        """Wait for the stream."""
        self._event.synchronize()


class CudaSlots:
    """Slots in the memory of the GPU that this worker uses, whatever index it has here.

    Buckets are loaded on a stream that waits for no other: what the engine still has in the GPU's queues is for its
    `Loader.pause` to wait for.

    Args:
        slots: from the daemon.

    Raises:
        PeerError: the GPU is not visible here, or the memory cannot be opened.
    """

    def __init__(self, slots: SlotSet) -> None:
        if len(slots.handles) != 1:
            raise PeerError(f"{len(slots.handles)} handles for the slots of {slots.gpu}; cuda has one")
        self._gpu = slots.gpu
        try:
            index = device_index(slots.gpu)
            self.device = torch.device("cuda", index)
            self._driver = driver()
            self._number = self._driver.devices()[index]
            with contextlib.ExitStack() as undo:
                self._context = self._driver.retain(self._number)
                undo.callback(self._driver.release, self._number)
                with self._here():
                    self._stream = _stream(index)
                    self._tables = _tables(index)  # now: to compile takes longer than an update may
                    self._address = self._driver.open(slots.handles[0])
                    undo.callback(self._driver.close, self._address)
                    mapped = _Mapped(self._address, slots.count * slots.slot_bytes)
                    everything = torch.as_tensor(mapped, device=self.device)
                undo.pop_all()
        except (CpeError, RuntimeError) as error:
            raise PeerError(f"cannot open the slots of {slots.gpu}: {error}") from None
        self._mapped = weakref.ref(mapped)
        self._views: tuple[torch.Tensor, ...] = everything.split(slots.slot_bytes)

    def slot(self, index: int) -> torch.Tensor:
        """Return slot ``index`` as uint8 ``[slot_bytes]``."""
        return self._views[index]

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Have everything issued inside go to the slots' stream; if something is raised, wait for what was issued."""
        with self._here(), torch.cuda.stream(self._stream):
            try:
                yield
            except BaseException:  # task boundary: only waited for here, and raised again
                with contextlib.suppress(RuntimeError):  # the GPU's own failure would hide what led to it
                    self._stream.synchronize()
                raise

    def mark(self) -> Mark:
        """Mark what the slots' stream was given so far."""
        return _Event(self._stream.record_event())

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Issue a copy within the GPU's memory; to be called in `loading`."""
        self._driver.copy_on_device(destination, source, nbytes, self._stream.cuda_stream)

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        """Make a table of them, for one launch.

        They are issued one by one where they are few, or no kernel is to be had, or one overwrites another.
        """
        rectangles = tuple(rectangles)
        table = None
        if self._tables is not None and len(rectangles) > _FEW and not overlap(rectangles):
            table = self._tables.make(rectangles)

        def issue(base: int) -> None:
            if table is not None and base % _TABLE_ALIGNMENT == 0:
                table.copy(base, self._stream.cuda_stream)
            else:
                self._issue(rectangles, base)

        return issue

    def _issue(self, rectangles: Sequence[Rectangle], base: int) -> None:
        for rectangle in rectangles:
            if rectangle.rows == 1:
                self.copy(rectangle.destination, base + rectangle.source, rectangle.nbytes)
            else:
                copy_rows(rectangle.moved(0, base), self._at)

    def _at(self, address: int, nbytes: int) -> torch.Tensor:
        """Memory of the GPU as uint8 ``[nbytes]``."""
        return torch.as_tensor(_Mapped(address, nbytes), device=self.device)

    def close(self) -> None:
        """Unmap the memory, which the daemon is free to give back then."""
        self._views = ()
        if self._mapped() is not None:
            gc.collect()
        if self._mapped() is not None:
            log.error(
                "somebody keeps a view of the slots of %s, so their memory stays in use; who is given a tensor to load"
                " has to copy it",
                self._gpu,
            )
            return  # unmapped, it would bring the process down at the next look
        with (
            self._here(),
            contextlib.suppress(CudaError),
        ):  # of a GPU that has failed: the mapping went with its context
            self._driver.close(self._address)
        self._driver.release(self._number)

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """Make the GPU the thread's current one, for torch and for the driver, which may not have met this thread."""
        with torch.cuda.device(self.device):
            self._driver.use(self._context)
            yield


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """A GPU's stream for loading: one for good, since memory that torch's allocator keeps is tied to its stream."""
    return torch.cuda.Stream(index)


@functools.cache
def _tables(index: int) -> Tables | None:
    """A GPU's kernel; None, which is said once, if it cannot be had."""
    try:
        return Tables(index)
    except ResourceError as error:
        log.warning("no kernel for copies on GPU %d, which are issued one by one: %s", index, error.message)
        return None


def device_index(uuid: str) -> int:
    """This process's index of a GPU.

    Raises:
        PeerError: it is not visible here.
        ResourceError: there is no NVIDIA driver here.
    """
    here = [driver().uuid(device) for device in driver().devices()]
    if uuid not in here:
        raise PeerError(f"{uuid} is not visible to this process, which sees {', '.join(here) or 'no GPU'}")
    return here.index(uuid)


def gpu_uuid(index: int) -> str:
    """A GPU's UUID as ``nvidia-smi -L`` prints it; ``index`` is torch's, and the driver's.

    Raises:
        ResourceError: there is no NVIDIA driver here.
    """
    return driver().uuid(driver().devices()[index])

"""The worker's half: a GPU's slots, opened by their handle and seen as torch tensors."""

from __future__ import annotations

import os
from typing import Any

import torch

from cpe_daemon.devices.cuda.driver import driver
from cpe_daemon.errors import CpeError, PeerError
from cpe_daemon.links.handoff import claim
from cpe_daemon.wire.messages import SlotSet


class _Mapped:
    """Memory at an address, as torch takes it over without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class CudaSlots:
    """Slots in the memory of the GPU that this worker uses, whatever index it has here.

    Keeps a tether, by which the daemon learns at once that this process is gone.

    Raises:
        PeerError: the GPU is not visible here, or the memory cannot be opened.
    """

    def __init__(self, slots: SlotSet, handoff: str) -> None:
        if len(slots.handles) != 2:
            raise PeerError(
                f"{len(slots.handles)} handles for the slots of {slots.gpu}; cuda has a token and one handle"
            )
        token, handle = slots.handles
        self._slots = slots
        self._index = device_index(slots.gpu)
        fd, self._tether = claim(handoff, token)
        os.close(fd)
        try:
            with torch.cuda.device(self._index):
                torch.cuda.current_stream()  # makes the primary context this thread's
                torch.cuda.synchronize()
                self._address = driver().open(handle)
                self._bytes = torch.as_tensor(
                    _Mapped(self._address, slots.count * slots.slot_bytes), device=f"cuda:{self._index}"
                )
        except (CpeError, RuntimeError) as error:
            self._tether.close()
            raise PeerError(f"cannot open the slots of {slots.gpu}: {error}") from None

    def slot(self, index: int) -> torch.Tensor:
        """Return slot ``index`` as uint8 ``[slot_bytes]``."""
        return self._bytes.narrow(0, index * self._slots.slot_bytes, self._slots.slot_bytes)

    @property
    def lost(self) -> bool:
        """Whether the daemon has ended: its end of the tether is closed."""
        return self._tether.cut

    def close(self) -> None:
        """Unmap when the GPU has done with it, and let go of the tether."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        try:
            with torch.cuda.device(self._index):
                torch.cuda.synchronize()
                driver().close(self._address)
        finally:
            self._tether.close()


def device_index(uuid: str) -> int:
    """This process's index of a GPU.

    Raises:
        PeerError: it is not visible here.
    """
    here = [gpu_uuid(index) for index in range(torch.cuda.device_count())]
    if uuid not in here:
        raise PeerError(f"{uuid} is not visible to this process, which sees {', '.join(here) or 'no GPU'}")
    return here.index(uuid)


def gpu_uuid(index: int) -> str:
    """A GPU's UUID as ``nvidia-smi -L`` prints it."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"

"""The bytes of tensors, wherever they are and however they lie."""

from __future__ import annotations

from types import TracebackType
from typing import Final, NamedTuple, Self

import torch
from torch import Tensor

from cpe_daemon.devices.memory import copy
from cpe_daemon.errors import ResourceError
from cpe_daemon.publisher.gpus import Fetcher, Gpus
from cpe_daemon.publisher.window import Window

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Source(NamedTuple):
    """Contiguous bytes: at ``address``, in the memory of the GPU ``device`` or, if that is None, of the host."""

    address: int
    device: int | None


class Reader:
    """Copies tensors' bytes, for one thread. A context: what it copied has arrived when it ends."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._fetcher: Fetcher | None = None
        self._made: tuple[Tensor, Tensor] | None = None
        self._kept: list[Tensor] = []  # what is copied from, until it has been

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what was copied, and end. Blocking."""
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None

    @property
    def pending(self) -> bool:
        """Whether bytes are on their way, which `arrive` waits for."""
        return self._fetcher is not None and self._fetcher.pending

    def find(self, tensor: Tensor) -> Source:
        """Say where a tensor's bytes are, valid until the next but one `arrive`; makes them contiguous if need be.

        Raises:
            ResourceError: the GPU has no room for that.
        """
        device = self._gpus.device_of(tensor)
        if (tensor.is_cpu or device is not None) and is_plain(tensor):
            return Source(tensor.data_ptr(), device)
        if self._made is None or self._made[0] is not tensor:
            self._made = tensor, self._make(tensor, device)
        self._kept.append(self._made[1])
        return Source(self._made[1].data_ptr(), device)

    def copy(self, source: Source, start: int, nbytes: int, window: Window, at: int) -> None:
        """Copy ``nbytes`` from ``start`` on to position ``at`` of a window. Releases the GIL."""
        if source.device is None:
            copy(window.address + at, source.address + start, nbytes)
            return
        if self._fetcher is None:
            self._fetcher = Fetcher(self._gpus)
        self._fetcher.fetch(source.device, source.address + start, window, at, nbytes)

    def arrive(self) -> None:
        """Wait until all that was copied is there."""
        if self._fetcher is not None:
            self._fetcher.arrive()
        self._kept.clear()

    def _make(self, tensor: Tensor, device: int | None) -> Tensor:
        """A contiguous tensor of the same values, in the same GPU or, if there is none, on the host."""
        plain = tensor.detach().resolve_conj().resolve_neg()
        try:
            made = _contiguous(plain)
        except torch.OutOfMemoryError:
            raise ResourceError(
                f"GPU {tensor.device} has no room to gather a tensor of {tensor.nbytes} bytes that is not contiguous:"
                " publish its contiguous()"
            ) from None
        if device is None:
            return made.cpu()
        self._gpus.settle(device)
        return made


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its values as they are, one after another.

    A conjugated or negated view shares its base's memory, which holds other values than the tensor.
    """
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _contiguous(tensor: Tensor) -> Tensor:
    """Copy as plain bits: torch cannot copy all of the dtypes that it has, or warns of it."""
    bits = _BITS.get(tensor.element_size())
    return (tensor if bits is None else tensor.view(bits)).contiguous()

"""Rectangles of bytes, copied by the CPU; and the strided copy of torch's, for those of many short rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Final

import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.devices.memory import copy

_LONG_BYTES: Final = 16 << 10
"""A row of which one call is worth it."""
_FEW_ROWS: Final = 4

_WORDS: Final = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def copying(rectangles: Sequence[Rectangle]) -> Callable[[int], None]:
    """Return what copies rectangles, in their order, whose sources count from the address that it is given."""
    rectangles = tuple(rectangles)

    def copy_all(base: int) -> None:
        for rectangle in rectangles:
            destination, source, nbytes, rows, destination_pitch, source_pitch = rectangle
            if rows > _FEW_ROWS and nbytes < _LONG_BYTES:
                copy_rows(rectangle.moved(0, base), _host)
                continue
            for row in range(rows):
                copy(destination + row * destination_pitch, base + source + row * source_pitch, nbytes)

    return copy_all


def copy_rows(rectangle: Rectangle, memory: Callable[[int, int], torch.Tensor]) -> None:
    """Copy the rows of a rectangle by torch.

    Args:
        rectangle: both ends are addresses.
        memory: returns what is at an address: uint8 ``[nbytes]``, called as memory(address, nbytes).
    """
    destination, source, nbytes, rows, destination_pitch, source_pitch = rectangle
    if not nbytes:
        return
    aligned = destination | source | nbytes | destination_pitch | source_pitch
    size, word = next(entry for entry in _WORDS if not aligned % entry[0])
    shape = rows, nbytes // size
    read = memory(source, _extent(rows, source_pitch, nbytes)).view(word)
    written = memory(destination, _extent(rows, destination_pitch, nbytes)).view(word)
    written.as_strided(shape, (destination_pitch // size, 1)).copy_(read.as_strided(shape, (source_pitch // size, 1)))


def _extent(rows: int, pitch: int, nbytes: int) -> int:
    return (rows - 1) * pitch + nbytes


def _host(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

"""Kernels in CUDA C, compiled when they are first needed, by the NVRTC library that comes with torch.

No toolkit and no C compiler is needed, and what is compiled is for the GPU at hand. To compile takes some tenths of a
second, to launch some microseconds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from cpe_daemon.devices.cuda.driver import Driver, driver
from cpe_daemon.errors import ResourceError

_BARE: Final = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_PACKAGED: Final = "nvidia/*/lib/libnvrtc.so.*"


class Kernel:
    """One function on one GPU, loaded into the context that was the thread's current one when it was made.

    Launches go to a stream and return at once. It is never unloaded: it goes with the context.

    Args:
        source: CUDA C, in which the function is ``extern "C"``.
        name: of the function.
        index: torch's of the GPU.

    Raises:
        ResourceError: there is no NVRTC here, it refuses the source, or the GPU has failed; says which.
    """

    def __init__(self, source: str, name: str, index: int) -> None:
        major, minor = torch.cuda.get_device_capability(index)
        self._driver: Driver = driver()
        self._function = self._driver.load(_compiled(source, f"sm_{major}{minor}"), name)
        self.processors: int = torch.cuda.get_device_properties(index).multi_processor_count
        """Of the GPU."""

    def launch(self, blocks: int, threads: int, arguments: Arguments, stream: int) -> None:
        """Issue it over ``blocks`` of ``threads`` each.

        Raises:
            CudaError: the GPU does not take it.
        """
        self._driver.launch(self._function, blocks, threads, arguments.pointers, stream)


class Arguments:
    """Arguments of a kernel, each 64 bits wide: made once, and passed as often as wanted."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = (ctypes.c_uint64 * len(values))(*values)
        addresses = [ctypes.addressof(self._values) + 8 * at for at in range(len(values))]
        self.pointers = (ctypes.c_void_p * len(values))(*addresses)
        """What the driver wants to be given."""

    def __setitem__(self, at: int, value: int) -> None:
        self._values[at] = value


@functools.cache
def _compiled(source: str, architecture: str) -> bytes:
    """Compile for an architecture, such as ``sm_90``."""
    library = _nvrtc()
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"cpe.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        if library.nvrtcCompileProgram(program, 1, options):
            raise ResourceError(f"NVRTC cannot compile for {architecture}: {_log(library, program)}")
        size = ctypes.c_size_t()
        _check(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check(library, library.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(max(size.value, 1))
    library.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def _check(library: ctypes.CDLL, result: int) -> None:
    if result:
        reason: Any = library.nvrtcGetErrorString(result)
        raise ResourceError(f"NVRTC failed: {reason.decode(errors='replace')} ({result})")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library: where the loader finds one, or in the packages that torch came with."""
    for name in _names():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        library.nvrtcGetErrorString.argtypes = (ctypes.c_int,)
        return library
    raise ResourceError(f"no NVRTC library here, neither {_BARE[0]} nor in torch's packages")


def _names() -> Iterator[str]:
    """Torch's own first: it knows the GPUs that torch knows."""
    packages = Path(torch.__file__).parents[1]
    yield from sorted((str(path) for path in packages.glob(_PACKAGED) if "alt" not in path.name), reverse=True)
    yield from _BARE

"""The part of NVIDIA's driver library that is needed, as plain functions of integers.

The driver's library (``libcuda.so.1``) comes with the driver, so the daemon depends on no CUDA toolkit, and on no
particular torch. Handles of memory that it exports are those of the runtime API. Every call releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import uuid
from typing import Any, Final

from cpe_daemon.errors import ResourceError

LIBRARY: Final = "libcuda.so.1"
HANDLE_BYTES: Final = 64
"""Size of an exported memory handle."""

_OUT_OF_MEMORY: Final = 2
_PEER_ACCESS_ALREADY_ENABLED: Final = 704
_LAZY_ENABLE_PEER_ACCESS: Final = 1
_HOST_REGISTER_PORTABLE: Final = 1
_EVENT_BLOCKING_SYNC_WITHOUT_TIMING: Final = 1 | 2
_STREAM_NON_BLOCKING: Final = 1
_P2P_NATIVE_ATOMICS: Final = 3
_NAME_BYTES: Final = 256


class CudaError(ResourceError):
    """A call of the driver's failed; ``result`` is its number."""

    def __init__(self, call: str, result: int, reason: str) -> None:
        super().__init__(f"{call} failed: {reason}")
        self.result = result

    @property
    def out_of_memory(self) -> bool:
        """Whether the GPU (or, registering, the host) had not enough memory."""
        return self.result == _OUT_OF_MEMORY


class _Handle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


_INT: Final = ctypes.c_int
_UINT: Final = ctypes.c_uint
_SIZE: Final = ctypes.c_size_t
_PTR: Final = ctypes.c_uint64  # CUdeviceptr, and every opaque handle on the 64-bit hosts that have these GPUs
_OUT: Final = ctypes.c_void_p

_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (_UINT,),
    "cuDriverGetVersion": (_OUT,),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGet": (_OUT, _INT),
    "cuDeviceGetUuid_v2": (_OUT, _INT),
    "cuDeviceGetName": (_OUT, _INT, _INT),
    "cuDeviceGetPCIBusId": (_OUT, _INT, _INT),
    "cuDeviceTotalMem_v2": (_OUT, _INT),
    "cuDeviceCanAccessPeer": (_OUT, _INT, _INT),
    "cuDeviceGetP2PAttribute": (_OUT, _INT, _INT, _INT),
    "cuDevicePrimaryCtxGetState": (_INT, _OUT, _OUT),
    "cuDevicePrimaryCtxRetain": (_OUT, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxSetCurrent": (_PTR,),
    "cuCtxEnablePeerAccess": (_PTR, _UINT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (_PTR,),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemHostRegister_v2": (_PTR, _SIZE, _UINT),
    "cuMemHostUnregister": (_PTR,),
    "cuIpcGetMemHandle": (_OUT, _PTR),
    "cuIpcOpenMemHandle_v2": (_OUT, _Handle, _UINT),
    "cuIpcCloseMemHandle": (_PTR,),
    "cuStreamCreate": (_OUT, _UINT),
    "cuStreamDestroy_v2": (_PTR,),
    "cuEventCreate": (_OUT, _UINT),
    "cuEventRecord": (_PTR, _PTR),
    "cuEventSynchronize": (_PTR,),
    "cuEventDestroy_v2": (_PTR,),
    "cuStreamWaitEvent": (_PTR, _PTR, _UINT),
    "cuMemcpyHtoDAsync_v2": (_PTR, _PTR, _SIZE, _PTR),
    "cuMemcpyDtoHAsync_v2": (_PTR, _PTR, _SIZE, _PTR),
    "cuMemcpyDtoDAsync_v2": (_PTR, _PTR, _SIZE, _PTR),
    "cuMemcpyPeerAsync": (_PTR, _PTR, _PTR, _PTR, _SIZE, _PTR),
    "cuModuleLoadData": (_OUT, ctypes.c_char_p),
    "cuModuleGetFunction": (_OUT, _PTR, ctypes.c_char_p),
    "cuLaunchKernel": (_PTR, *(_UINT,) * 7, _PTR, _OUT, _OUT),
}


@functools.cache
def driver() -> Driver:
    """Return the driver of this host, initialised.

    Raises:
        ResourceError: there is none, or it finds no GPU that it can use.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ResourceError(
            f"no NVIDIA driver here ({error}); set device.kind to shm on a host without GPUs, and in a container"
            " mount the driver (the NVIDIA container runtime does)"
        ) from None
    return Driver(library)


class Driver:
    """The driver's calls. Thread-safe; memory, stream and event calls act on the thread's current context.

    Streams, events, contexts and device memory are plain integers, as the library gives them out.

    Raises:
        ResourceError: the library lacks a call, or refuses to start; says why.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise ResourceError(f"the NVIDIA driver lacks {name}; update it to 450 or later") from None
            function.argtypes = arguments
            function.restype = _INT
        library.cuGetErrorString.argtypes = (_INT, ctypes.POINTER(ctypes.c_char_p))
        self._library = library
        self._call("cuInit", 0)
        self._to_device = library.cuMemcpyHtoDAsync_v2  # looked up once: thousands are issued a second
        self._to_host = library.cuMemcpyDtoHAsync_v2
        self._on_device = library.cuMemcpyDtoDAsync_v2
        self._from_peer = library.cuMemcpyPeerAsync
        self._launch = library.cuLaunchKernel

    # --- devices -----------------------------------------------------------------------------------------------------

    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver speaks: (major, minor)."""
        number = self._int("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def devices(self) -> list[int]:
        """The GPUs that this process may use."""
        return [self._int("cuDeviceGet", index) for index in range(self._int("cuDeviceGetCount"))]

    def uuid(self, device: int) -> str:
        """A GPU's name for ever, as ``nvidia-smi -L`` prints it: ``GPU-…``."""
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", raw, device)
        return f"GPU-{uuid.UUID(bytes=bytes(raw))}"

    def name(self, device: int) -> str:
        """The product's name."""
        return self._text("cuDeviceGetName", device)

    def pci_bus_id(self, device: int) -> str:
        """Domain, bus, device and function, as in ``0000:18:00.0``."""
        return self._text("cuDeviceGetPCIBusId", device)

    def total_bytes(self, device: int) -> int:
        """Size of a GPU's memory."""
        out = _SIZE()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(out), device)
        return out.value

    def can_access(self, device: int, peer: int) -> bool:
        """Whether a GPU can copy from another's memory directly."""
        return bool(self._int("cuDeviceCanAccessPeer", device, peer))

    def linked(self, device: int, peer: int) -> bool:
        """Whether two GPUs are joined by NVLink: atomics across, which PCIe does not carry, tell."""
        out = _INT()
        self._call("cuDeviceGetP2PAttribute", ctypes.byref(out), _P2P_NATIVE_ATOMICS, device, peer)
        return bool(out.value)

    # --- contexts and memory -----------------------------------------------------------------------------------------

    def is_active(self, device: int) -> bool:
        """Whether this process uses a GPU already: to `retain` another's context takes some of its memory."""
        flags, active = _UINT(), _INT()
        self._call("cuDevicePrimaryCtxGetState", device, ctypes.byref(flags), ctypes.byref(active))
        return bool(active.value)

    def retain(self, device: int) -> int:
        """Return a GPU's primary context, which torch uses too; give it back by `release`."""
        return self._handle("cuDevicePrimaryCtxRetain", device)

    def release(self, device: int) -> None:
        """Give the primary context back; with its last user it goes, and all that was made in it."""
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    def use(self, context: int) -> None:
        """Have this thread's calls act on ``context``."""
        self._call("cuCtxSetCurrent", context)

    def enable_peer(self, context: int) -> None:
        """Let the current context copy from the memory of another."""
        result = self._library.cuCtxEnablePeerAccess(context, 0)
        if result not in {0, _PEER_ACCESS_ALREADY_ENABLED}:
            self._raise("cuCtxEnablePeerAccess", result)

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory on the current context's GPU."""
        return self._handle("cuMemAlloc_v2", nbytes)

    def free(self, address: int) -> None:
        """Free what `allocate` gave; waits for what the GPU still does."""
        self._call("cuMemFree_v2", address)

    def free_bytes(self) -> int:
        """Memory of the current context's GPU that nobody has."""
        free, total = _SIZE(), _SIZE()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory for copies by every GPU. Takes about 50 ms a GiB."""
        self._call("cuMemHostRegister_v2", address, nbytes, _HOST_REGISTER_PORTABLE)

    def unregister(self, address: int) -> None:
        """Unpin what `register` pinned."""
        self._call("cuMemHostUnregister", address)

    def export(self, address: int) -> bytes:
        """Return the handle by which another process opens what `allocate` gave."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Map memory that another process exported; returns its address here."""
        if len(handle) != HANDLE_BYTES:
            raise ResourceError(f"a memory handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        out = _PTR()
        self._call(
            "cuIpcOpenMemHandle_v2", ctypes.byref(out), _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS
        )
        return out.value

    def close(self, address: int) -> None:
        """Unmap what `open` mapped."""
        self._call("cuIpcCloseMemHandle", address)

    # --- streams and copies ------------------------------------------------------------------------------------------

    def create_stream(self) -> int:
        """Return a new stream, which waits for no other."""
        return self._handle("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; what was issued on it still ends."""
        self._call("cuStreamDestroy_v2", stream)

    def create_event(self) -> int:
        """Return a new event, for which one waits without spinning."""
        return self._handle("cuEventCreate", _EVENT_BLOCKING_SYNC_WITHOUT_TIMING)

    def record(self, event: int, stream: int) -> None:
        """Have ``event`` happen when all that was issued on ``stream`` is done."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Block until ``event`` has happened; raises what became of the work before it."""
        self._call("cuEventSynchronize", event)

    def await_event(self, stream: int, event: int) -> None:
        """Have ``stream``, of any GPU, go on when what ``event`` was last recorded for has happened."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cuEventDestroy_v2", event)

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Issue a copy from pinned host memory."""
        result = self._to_device(destination, source, nbytes, stream)
        if result:
            self._raise("cuMemcpyHtoDAsync", result)

    def copy_to_host(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Issue a copy to pinned host memory."""
        result = self._to_host(destination, source, nbytes, stream)
        if result:
            self._raise("cuMemcpyDtoHAsync", result)

    def copy_on_device(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Issue a copy within a GPU's memory."""
        result = self._on_device(destination, source, nbytes, stream)
        if result:
            self._raise("cuMemcpyDtoDAsync", result)

    def copy_from_peer(
        self, destination: int, context: int, source: int, peer_context: int, nbytes: int, stream: int
    ) -> None:
        """Issue a copy from another GPU's memory."""
        result = self._from_peer(destination, context, source, peer_context, nbytes, stream)
        if result:
            self._raise("cuMemcpyPeerAsync", result)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def load(self, image: bytes, name: str) -> int:
        """Load compiled code into the current context, and return a function of it."""
        return self._handle("cuModuleGetFunction", self._handle("cuModuleLoadData", image), name.encode())

    def launch(self, function: int, blocks: int, threads: int, arguments: ctypes.Array[Any], stream: int) -> None:
        """Issue a function over ``blocks`` of ``threads``; ``arguments`` are the addresses of what it is given."""
        result = self._launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, None)
        if result:
            self._raise("cuLaunchKernel", result)

    # --- calls -------------------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            self._raise(name, result)

    def _int(self, name: str, *arguments: object) -> int:
        out = _INT()
        self._call(name, ctypes.byref(out), *arguments)
        return out.value

    def _handle(self, name: str, *arguments: object) -> int:
        out = _PTR()
        self._call(name, ctypes.byref(out), *arguments)
        return out.value

    def _text(self, name: str, device: int) -> str:
        out = ctypes.create_string_buffer(_NAME_BYTES)
        self._call(name, out, _NAME_BYTES, device)
        return out.value.decode(errors="replace")

    def _raise(self, call: str, result: int) -> None:
        said = ctypes.c_char_p()
        self._library.cuGetErrorString(result, ctypes.byref(said))
        reason = said.value.decode(errors="replace") if said.value else "unknown error"
        raise CudaError(call, result, f"{reason} ({result})")

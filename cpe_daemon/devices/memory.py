"""Shared memory without names: memfd regions that are sealed against resizing, mapped once, and passed as descriptors.

Copies are plain `memmove` calls by address, which release the GIL; nothing here imports torch, so that the daemon of a
CPU host does not either.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Final

from cpe_daemon.errors import ConfigError, PeerError, ResourceError

_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_F_SEAL_SEAL: Final = 0x1
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_F_SEAL_FUTURE_WRITE: Final = 0x10
_MADV_POPULATE_WRITE: Final = 23

PREFAULT_BYTES: Final = 16 << 20
"""How much is best prefaulted in one call: whoever gives up waits no longer than that takes, hundredths of a second."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def copy(destination: int, source: int, nbytes: int) -> None:
    """Copy ``nbytes`` between two addresses of this process. Releases the GIL; the caller vouches for both ranges."""
    ctypes.memmove(destination, source, nbytes)


def address_of(buffer: memoryview) -> int:
    """Return the address of a writable, contiguous buffer; valid as long as the caller holds the buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


class SharedMemory:
    """One mapped memfd. `close` unmaps it; other processes' mappings of it live on.

    Thread-safe in so far as disjoint ranges may be used by different threads.
    """

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.nbytes = len(mapping)
        self.view = memoryview(mapping)
        self._mapping = mapping
        self.address = 0 if self.view.readonly else address_of(self.view)
        """Of the first byte; 0 for a read-only mapping."""

    @classmethod
    def create(cls, name: str, nbytes: int) -> SharedMemory:
        """Make a region of ``nbytes`` that nobody can resize. ``name`` shows in /proc only.

        Raises:
            ConfigError: no region has this size.
            ResourceError: the kernel refuses; says why.
        """
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            return cls(fd, mmap.mmap(fd, nbytes))
        except (OSError, ValueError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            kind = ResourceError if isinstance(error, OSError) else ConfigError
            raise kind(f"cannot map {nbytes} bytes of memory for {name}: {error}") from None

    @classmethod
    def attach(cls, fd: int, nbytes: int, *, writable: bool) -> SharedMemory:
        """Map a region that another process made; takes ownership of ``fd``.

        Raises:
            PeerError: it is not a region of at least ``nbytes`` sealed against shrinking.
        """
        try:
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
            if not 0 < nbytes <= os.fstat(fd).st_size or not seals & _F_SEAL_SHRINK:
                raise PeerError(f"the memory handed over is not a sealed region of {nbytes} bytes")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            return cls(fd, mmap.mmap(fd, nbytes, prot=access))
        except (OSError, ValueError) as error:
            os.close(fd)
            raise PeerError(f"cannot map {nbytes} bytes that were handed over: {error}") from None
        except PeerError:
            os.close(fd)
            raise

    def seal_writes(self) -> None:
        """Let later mappings be read-only; this process's own mapping stays writable.

        Raises:
            ConfigError: the kernel is older than 5.1, which introduced this.
        """
        try:
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | _F_SEAL_SEAL)
        except OSError as error:
            raise ConfigError(f"cannot keep other processes from writing to shared memory: {error}") from None

    def prefault(self, offset: int, nbytes: int) -> bool:
        """Have the kernel provide the pages of a range now: a first touch later costs ten times a warm copy. Blocking.

        Returns:
            Whether they are there; on a kernel before 5.14 they come at first touch.

        Raises:
            ResourceError: there is not enough memory.
        """
        start = ctypes.c_void_p(self.address + offset)
        if nbytes and _libc.madvise(start, ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code != errno.EINVAL:
                raise ResourceError(f"cannot provide {nbytes} bytes of memory: {os.strerror(code)}")
            return False
        return True

    def close(self) -> None:
        """Unmap and close, once. Views that others still hold keep the mapping until they are gone."""
        if self.fd < 0:
            return
        try:
            self.view.release()
            self._mapping.close()
        except BufferError:
            return  # a tensor still looks at it: unmapped with the last one
        finally:
            os.close(self.fd)
            self.fd = -1

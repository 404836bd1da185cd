"""Shared memory without names: it cannot be resized, can be made read-only for others, and outlives nobody's view."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpe_daemon.devices import memory
from cpe_daemon.devices.memory import SharedMemory, address_of, copy
from cpe_daemon.errors import ConfigError, PeerError, ResourceError

PAGE = mmap.PAGESIZE
F_ADD_SEALS = 1033
F_SEAL_SHRINK, F_SEAL_WRITE = 0x2, 0x8


@pytest.fixture(autouse=True)
def nothing_kept(no_leaks: None) -> None:
    """Every test here gives back what it takes."""


@pytest.fixture
def region() -> Iterator[SharedMemory]:
    made = SharedMemory.create("cpe-test", 4 * PAGE)
    yield made
    made.close()


def reopened(fd: int) -> int:
    """Another open file of the same region, as another process may make one."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def mapped(name: str) -> int:
    """How many mappings of regions called ``name`` this process has."""
    return sum(f"memfd:{name} " in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_region_has_its_size_and_holds_what_is_written(region: SharedMemory) -> None:
    assert (region.nbytes, len(region.view)) == (4 * PAGE, 4 * PAGE)
    assert bytes(region.view) == bytes(4 * PAGE)
    region.view[PAGE : PAGE + 3] = b"abc"
    assert os.pread(region.fd, 3, PAGE) == b"abc"


def test_address_is_of_the_first_byte(region: SharedMemory) -> None:
    source = bytearray(b"hello")
    copy(region.address + 10, address_of(memoryview(source)), 5)
    assert bytes(region.view[10:15]) == b"hello"
    assert address_of(region.view[10:]) == region.address + 10


def test_address_of_nothing_is_zero() -> None:
    assert address_of(memoryview(bytearray())) == 0


def test_address_of_a_read_only_buffer_is_refused() -> None:
    with pytest.raises(TypeError):
        address_of(memoryview(b"constant"))


@pytest.mark.parametrize("nbytes", [0, PAGE, 5 * PAGE])
def test_nobody_resizes_a_region(region: SharedMemory, nbytes: int) -> None:
    other = reopened(region.fd)
    for fd in (region.fd, other):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, nbytes)
    os.close(other)
    region.view[-1] = 7


def test_region_without_write_seal_can_be_written_by_who_maps_it(region: SharedMemory) -> None:
    other = SharedMemory.attach(reopened(region.fd), region.nbytes, writable=True)
    other.view[0] = 9
    assert region.view[0] == 9
    other.close()


def test_sealed_writes_leave_others_read_only(region: SharedMemory) -> None:
    region.seal_writes()
    region.view[0] = 5
    other = SharedMemory.attach(reopened(region.fd), region.nbytes, writable=False)
    assert other.view.readonly
    assert other.address == 0
    assert other.view[0] == 5
    region.view[0] = 6
    assert other.view[0] == 6
    other.close()


def test_sealed_writes_refuse_others_a_writable_mapping(region: SharedMemory) -> None:
    region.seal_writes()
    with pytest.raises(PeerError, match="cannot map"):
        SharedMemory.attach(reopened(region.fd), region.nbytes, writable=True)
    fd = reopened(region.fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)  # the seals themselves are sealed
    os.close(fd)


def test_kernel_without_the_write_seal_is_a_config_error(region: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_F_SEAL_FUTURE_WRITE", 1 << 20)
    with pytest.raises(ConfigError, match="writing"):
        region.seal_writes()


@pytest.mark.parametrize(
    ("nbytes", "kind"), [(-1, ResourceError), (0, ConfigError), (1 << 60, ResourceError), (1 << 70, ConfigError)]
)
def test_impossible_size_is_an_error_and_leaves_nothing(nbytes: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="cannot map"):
        SharedMemory.create("cpe-test", nbytes)


def test_no_descriptor_left_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", exhausted)
    with pytest.raises(ResourceError, match="Too many open files"):
        SharedMemory.create("cpe-test", PAGE)


def test_attach_refuses_a_region_that_is_too_small(region: SharedMemory) -> None:
    with pytest.raises(PeerError, match="not a sealed region of"):
        SharedMemory.attach(reopened(region.fd), region.nbytes + 1, writable=False)


def test_attach_refuses_memory_that_may_still_shrink() -> None:
    """Whoever reads beyond the end of a region that its owner has cut off dies of SIGBUS."""
    fd = os.memfd_create("cpe-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(PeerError, match="not a sealed region"):
        SharedMemory.attach(fd, PAGE, writable=False)


def test_attach_refuses_what_is_no_memory_at_all() -> None:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), PAGE)
        with pytest.raises(PeerError, match="cannot map"):
            SharedMemory.attach(os.dup(file.fileno()), PAGE, writable=False)
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(PeerError):
        SharedMemory.attach(read, PAGE, writable=False)


def test_attach_of_nothing_is_refused(region: SharedMemory) -> None:
    with pytest.raises(PeerError):
        SharedMemory.attach(reopened(region.fd), 0, writable=False)


def test_prefault_provides_the_pages_of_a_range() -> None:
    region = SharedMemory.create("cpe-test", 64 * PAGE)
    before = provided(region)
    region.prefault(16 * PAGE, 8 * PAGE)
    assert before == 0
    assert provided(region) == 8
    region.prefault(0, 0)
    assert provided(region) == 8
    region.close()


def provided(region: SharedMemory) -> int:
    """Pages of a region that this process has mapped by now."""
    count = region.nbytes // PAGE
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(region.address // PAGE * 8)
        entries = struct.unpack(f"{count}Q", pagemap.read(count * 8))
    return sum(entry >> 63 for entry in entries)


def test_prefault_on_an_old_kernel_leaves_it_to_the_first_touch(
    region: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MADV_POPULATE_WRITE", 9999)
    region.prefault(0, region.nbytes)


def test_prefault_without_memory_is_a_resource_error(region: SharedMemory) -> None:
    with pytest.raises(ResourceError, match="cannot provide"):
        region.prefault(1 << 46, PAGE)  # no such addresses: ENOMEM, as when memory is short


def test_close_unmaps(region: SharedMemory) -> None:
    assert mapped("cpe-test") == 1
    region.close()
    assert mapped("cpe-test") == 0


def test_close_twice_closes_no_descriptor_of_somebody_else(region: SharedMemory) -> None:
    number = region.fd
    region.close()
    reused = os.open(os.devnull, os.O_RDONLY)
    assert reused == number
    region.close()
    os.fstat(reused)
    os.close(reused)


def test_view_that_somebody_holds_keeps_the_mapping() -> None:
    region = SharedMemory.create("cpe-test", PAGE)
    region.view[0] = 3
    part = region.view[:10]
    region.close()
    assert mapped("cpe-test") == 1
    assert part[0] == 3
    part.release()
    del part, region
    assert mapped("cpe-test") == 0


def test_close_while_the_buffer_is_exported_raises_nothing() -> None:
    region = SharedMemory.create("cpe-test", PAGE)
    exported = (ctypes.c_char * PAGE).from_buffer(region.view)  # as numpy would
    region.close()
    assert mapped("cpe-test") == 1
    exported[0] = b"x"
    del exported, region
    assert mapped("cpe-test") == 0

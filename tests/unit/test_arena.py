"""The arena: one sealed region, prefaulted off the loop, from which extents are cut."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon import arena as arena_module
from cpe_daemon.arena import Arena
from cpe_daemon.core.extents import Extent
from cpe_daemon.core.types import ALIGNMENT_BYTES, align
from cpe_daemon.errors import ArenaFullError, MisuseError, ResourceError

A = ALIGNMENT_BYTES
MIB = 1 << 20


@pytest.fixture
def arena(no_leaks: None) -> Iterator[Arena]:
    made = Arena(MIB)
    yield made
    made.close()


def region_fd() -> int:
    """A descriptor of the arena's region, opened anew as a stranger would."""
    for name in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd") / name
        if link.is_symlink() and os.readlink(link).startswith("/memfd:cpe-arena"):
            return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    raise LookupError("no arena is open")


@pytest.mark.parametrize("nbytes", [0, MIB - 1, MIB + 1])
def test_another_descriptor_cannot_resize_the_region(nbytes: int, arena: Arena) -> None:
    fd = region_fd()
    with pytest.raises(PermissionError):
        os.ftruncate(fd, nbytes)
    assert os.fstat(fd).st_size == arena.nbytes
    os.close(fd)
    arena.view[-1] = 1


def test_children_do_not_inherit_the_region(arena: Arena) -> None:
    fds = [int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
    ours = [fd for fd in fds if "cpe-arena" in os.readlink(f"/proc/self/fd/{fd}")]
    assert ours
    assert not any(os.get_inheritable(fd) for fd in ours)
    assert arena.nbytes == MIB


def test_extents_are_cut_and_given_back(arena: Arena) -> None:
    first, second = arena.reserve(10), arena.reserve(A + 1)
    assert (first, second) == (Extent(0, 10), Extent(A, A + 1))
    assert arena.free_bytes == arena.largest_free_bytes == MIB - 3 * A
    arena.release(first)
    assert (arena.free_bytes, arena.largest_free_bytes) == (MIB - 2 * A, MIB - 3 * A)
    arena.release(second)
    assert arena.free_bytes == MIB
    with pytest.raises(MisuseError):
        arena.release(second)


def test_full_arena_says_need_and_free(arena: Arena) -> None:
    arena.reserve(MIB - A)
    with pytest.raises(ArenaFullError) as caught:
        arena.reserve(A + 1)
    assert (caught.value.need_bytes, caught.value.free_bytes, caught.value.largest_bytes) == (2 * A, A, A)


@given(sizes=st.lists(st.integers(0, 9 * A), max_size=12), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_largest_free_without_is_what_would_fit_then(sizes: list[int], data: st.DataObject) -> None:
    arena = Arena(64 * A)
    extents = [arena.reserve(nbytes) for nbytes in sizes if align(nbytes) <= arena.largest_free_bytes]
    if extents:
        arena.release(extents.pop(data.draw(st.integers(0, len(extents) - 1))))
    going = [extent for extent in extents if data.draw(st.booleans())]
    expected = arena.largest_free_without(going)
    for extent in going:
        arena.release(extent)
    assert expected == arena.largest_free_bytes
    arena.close()


def test_region_that_cannot_be_mapped_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="cannot map"):
        Arena(1 << 60)


async def test_prefault_touches_everything_and_says_how_far_it_is(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "PREFAULT_BYTES", 300_000)
    said: list[tuple[int, int]] = []
    loop_thread = threading.get_ident()

    def progress(done: int, total: int) -> None:
        assert threading.get_ident() == loop_thread
        said.append((done, total))

    assert arena.prefaulted_bytes == 0
    await arena.prefault(2, progress)
    assert arena.prefaulted_bytes == MIB
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1] == (MIB, MIB)
    assert len(said) == 4


async def test_prefault_leaves_the_loop_free(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon answers status while a terabyte is being touched."""
    answered = threading.Event()
    memory = arena._memory

    def slow(offset: int, nbytes: int) -> bool:
        return answered.wait(30.0)

    monkeypatch.setattr(memory, "prefault", slow)
    asyncio.get_running_loop().call_soon(answered.set)
    await arena.prefault(1)
    assert arena.prefaulted_bytes == MIB


async def test_prefault_without_memory_fails(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(offset: int, nbytes: int) -> None:
        raise ResourceError(f"cannot provide {nbytes} bytes of memory: Cannot allocate memory")

    monkeypatch.setattr(arena._memory, "prefault", no_memory)
    with pytest.raises(ResourceError, match="cannot provide"):
        await arena.prefault(2)
    assert arena.prefaulted_bytes == 0


async def test_prefault_that_fails_does_not_go_on(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second range may be in hand when the first fails; the 254 behind it are not begun."""
    asked: list[int] = []
    shut_down = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            shut_down.set()
            super().shutdown(wait=wait)

    def fail(offset: int, nbytes: int) -> None:
        asked.append(offset)
        assert not offset or shut_down.wait(30.0)
        raise ResourceError("no memory")

    monkeypatch.setattr(arena_module, "PREFAULT_BYTES", 4096)
    monkeypatch.setattr(arena_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(arena._memory, "prefault", fail)
    with pytest.raises(ResourceError):
        await arena.prefault(1)
    assert len(asked) <= 2


async def test_prefault_that_is_given_up_ends_with_the_ranges_in_hand(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    begun, going_on = threading.Event(), threading.Event()

    def slow(offset: int, nbytes: int) -> None:
        asked.append(offset)
        begun.set()
        assert going_on.wait(30.0)

    monkeypatch.setattr(arena_module, "PREFAULT_BYTES", 4096)
    monkeypatch.setattr(arena._memory, "prefault", slow)
    prefaulting = asyncio.create_task(arena.prefault(2))
    assert await asyncio.to_thread(begun.wait, 30.0)
    prefaulting.cancel()
    asyncio.get_running_loop().call_soon(going_on.set)
    with pytest.raises(asyncio.CancelledError):
        await prefaulting
    assert len(asked) <= 2
    assert arena.prefaulted_bytes == 0


async def test_prefault_by_default_says_nothing(arena: Arena) -> None:
    await arena.prefault(1)
    assert bytes(arena.view[:16]) == bytes(16)

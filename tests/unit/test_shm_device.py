"""The device of a CPU host: copies into slots, and what becomes of them when a round is given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from cpe_daemon.core.plan import Copy, PeerCopy
from cpe_daemon.devices import shm
from cpe_daemon.devices.memory import SharedMemory, copy
from cpe_daemon.devices.shm import ShmDevice
from cpe_daemon.errors import ResourceError

SLOT_BYTES = 4096


class NoHandoff:
    """Hands nothing over."""

    def offer(self, fd: int, on_gone: Callable[[], None]) -> bytes:
        raise NotImplementedError

    def withdraw(self, token: bytes) -> None:
        raise NotImplementedError


@pytest.fixture
async def device(no_leaks: None) -> AsyncIterator[ShmDevice]:
    """Two sets of two slots, over an arena with a byte pattern."""
    arena = SharedMemory.create("test-arena", 4 * SLOT_BYTES)
    arena.view[:] = bytes(index // SLOT_BYTES + 1 for index in range(4 * SLOT_BYTES))
    made = ShmDevice(gpus=2, slot_count=2, slot_bytes=SLOT_BYTES, source=arena.address, handoff=NoHandoff())
    await made.open()
    yield made
    await made.close()
    arena.close()


def held(device: ShmDevice, gpu: int, slot: int) -> bytes:
    """A slot's bytes."""
    return bytes(device._sets[gpu].view[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES])


async def test_slots_are_fetched_and_exchanged(device: ShmDevice) -> None:
    await device.fetch(0, 1, [Copy("", SLOT_BYTES, 0, 1024)])
    await device.fetch(1, 1, [Copy("", 2 * SLOT_BYTES, 1024, 1024)])
    await device.exchange(0, 1, [PeerCopy(1, 1024, 1024)])
    await device.exchange(1, 1, [PeerCopy(0, 0, 1024)])
    assert held(device, 0, 1) == held(device, 1, 1) == b"\2" * 1024 + b"\3" * 1024 + bytes(2048)
    assert held(device, 0, 0) == bytes(SLOT_BYTES)


async def test_bytes_of_another_node_are_refused(device: ShmDevice) -> None:
    with pytest.raises(ResourceError, match="node-7"):
        await device.fetch(0, 0, [Copy("node-7", 0, 0, 8)])


async def test_cancelled_copy_has_ended_before_its_caller_goes_on(
    device: ShmDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that went on would fill the slot of the next round with the last one's bytes."""
    begun, go_on = threading.Event(), threading.Event()

    def slow_copy(destination: int, source: int, nbytes: int) -> None:
        begun.set()
        assert go_on.wait(10)
        copy(destination, source, nbytes)

    monkeypatch.setattr(shm, "copy", slow_copy)
    running = asyncio.create_task(device.exchange(0, 0, [PeerCopy(1, 0, 64)]))
    waiting = asyncio.create_task(device.exchange(0, 1, [PeerCopy(1, 0, 64)]))
    await asyncio.to_thread(begun.wait, 10)
    running.cancel()
    waiting.cancel()
    done, pending = await asyncio.wait([running, waiting], timeout=0.2)
    assert (done, pending) == ({waiting}, {running})  # what had not begun never will
    go_on.set()
    await asyncio.wait([running], timeout=10)
    assert running.cancelled()

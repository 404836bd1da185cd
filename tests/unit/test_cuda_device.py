"""What is particular to NVIDIA GPUs, over a simulated driver; every device's contract is in test_device_contract.py."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from cpe_daemon.core.plan import HERE, Copy, PeerCopy
from cpe_daemon.devices.cuda import device as module
from cpe_daemon.devices.cuda import driver as bindings
from cpe_daemon.devices.cuda.device import CudaDevice
from cpe_daemon.devices.cuda.gpus import numa_node
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import ConfigError, ResourceError
from tests.unit.fake_cuda import FakeDriver

SLOT_BYTES = 4096
PIN_BYTES = 8192
WAIT_SECONDS = 20.0
ARENA_BYTES = 3 * PIN_BYTES - 4096

Made = Callable[..., "contextlib.AbstractAsyncContextManager[CudaDevice]"]


@pytest.fixture
def made(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Opens devices: ``async with made(FakeDriver(2), slots=3) as device``; the arena's bytes count up."""
    monkeypatch.setattr(module, "PIN_BYTES", PIN_BYTES)

    @contextlib.asynccontextmanager
    async def make(
        driver: FakeDriver,
        *,
        slots: int = 2,
        uuids: tuple[str, ...] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[CudaDevice]:
        monkeypatch.setattr(module, "driver", lambda: driver)
        arena = SharedMemory.create("cpe-test-arena", ARENA_BYTES)
        arena.view[:] = bytes(at // 16 % 251 for at in range(ARENA_BYTES))
        device = None
        try:
            device = CudaDevice(
                uuids=uuids,
                slot_bytes=SLOT_BYTES,
                source=arena.address,
                source_bytes=ARENA_BYTES,
                on_lost=on_lost,
            )
            await device.open(progress)
            for gpu in range(len(device.topology.gpus)):
                await device.take(gpu, slots)
            yield device
        finally:
            driver.go_on.set()
            if device is not None:
                await device.close()
            arena.close()

    return make


def held(driver: FakeDriver, device: CudaDevice, gpu: int, slot: int) -> bytes:
    """What a GPU's slot holds; GPUs allocate in their order."""
    address = list(driver.allocated)[gpu] + slot * device.slot_bytes
    return ctypes.string_at(address, device.slot_bytes)


def arena_bytes(start: int, nbytes: int) -> bytes:
    return bytes(at // 16 % 251 for at in range(start, start + nbytes))


async def test_everything_is_given_back(made: Made) -> None:
    driver = FakeDriver(2)
    async with made(driver) as device:
        assert len(driver.allocated) == 2
        assert sum(driver.pins.values()) == ARENA_BYTES
        await device.fetch(0, 0, [Copy(HERE, 0, 0, 64)])
    assert (driver.allocated, driver.pins, driver.retained, driver.events) == ({}, {}, [], set())


async def test_arena_is_pinned_in_ranges_and_says_how_far_it_is(made: Made) -> None:
    told: list[tuple[int, int]] = []
    async with made(FakeDriver(1), progress=lambda done, total: told.append((done, total))):
        assert told == [(PIN_BYTES, ARENA_BYTES), (2 * PIN_BYTES, ARENA_BYTES), (ARENA_BYTES, ARENA_BYTES)]


async def test_copy_that_reaches_over_two_pinned_ranges_is_issued_in_parts(made: Made) -> None:
    """The driver refuses it in one piece: seen on real GPUs, and held to by the simulated one."""
    driver = FakeDriver(1)
    async with made(driver) as device:
        await device.fetch(0, 1, [Copy(HERE, PIN_BYTES - 100, 0, 300), Copy(HERE, 2 * PIN_BYTES - 1, 512, 2)])
        assert held(driver, device, 0, 1)[:300] == arena_bytes(PIN_BYTES - 100, 300)
        assert held(driver, device, 0, 1)[512:514] == arena_bytes(2 * PIN_BYTES - 1, 2)


async def test_fetch_returns_when_the_bytes_are_there_and_not_when_they_were_asked_for(made: Made) -> None:
    driver = FakeDriver(1)
    async with made(driver) as device:
        driver.go_on.clear()
        fetching = asyncio.create_task(device.fetch(0, 0, [Copy(HERE, 0, 0, 64)]))
        assert await asyncio.to_thread(driver.awaited.wait, WAIT_SECONDS)
        assert device.stuck_seconds > 0.0
        assert not fetching.done()
        driver.go_on.set()
        await fetching
        assert device.stuck_seconds == 0.0
        assert held(driver, device, 0, 0)[:64] == arena_bytes(0, 64)


async def test_next_copies_are_issued_before_the_last_have_arrived(made: Made) -> None:
    """Otherwise the link idles from one bucket to the next."""
    driver = FakeDriver(1)
    issued = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()
    copy_to_device = driver.copy_to_device

    def counting(destination: int, source: int, nbytes: int, stream: int) -> None:
        copy_to_device(destination, source, nbytes, stream)
        loop.call_soon_threadsafe(issued.release)

    driver.copy_to_device = counting  # type: ignore[method-assign]
    async with made(driver) as device, asyncio.TaskGroup() as tasks:
        driver.go_on.clear()
        for slot in range(2):
            tasks.create_task(device.fetch(0, slot, [Copy(HERE, 0, 0, 64)]))
        async with asyncio.timeout(WAIT_SECONDS):
            await issued.acquire()
            await issued.acquire()
        driver.go_on.set()


async def test_cancelled_copies_have_ended_before_their_caller_goes_on(made: Made) -> None:
    driver = FakeDriver(1)
    async with made(driver) as device:
        driver.go_on.clear()
        fetching = asyncio.create_task(device.fetch(0, 0, [Copy(HERE, 0, 0, 64)]))
        assert await asyncio.to_thread(driver.awaited.wait, WAIT_SECONDS)
        assert device.stuck_seconds > 0.0
        for _ in range(3):
            fetching.cancel()
            await asyncio.sleep(0)
        assert not fetching.done()
        driver.go_on.set()
        await asyncio.wait([fetching])
        assert fetching.cancelled()
        assert held(driver, device, 0, 0)[:64] == arena_bytes(0, 64)


async def test_slots_are_fewer_where_memory_is_short_and_the_same_on_every_gpu(made: Made) -> None:
    driver = FakeDriver(2, total=3 * SLOT_BYTES)
    driver.retain(0)
    driver.use(1)
    taken = driver.allocate(2 * SLOT_BYTES)  # somebody else's, on the first GPU
    async with made(driver, slots=3) as device:
        assert device.slot_count == 1
        await device.fetch(1, 0, [Copy(HERE, 0, 0, 64)])
    assert driver.allocated == {taken: 2 * SLOT_BYTES}
    driver.release(0)


async def test_no_room_for_one_slot_is_refused_with_what_to_do(made: Made) -> None:
    driver = FakeDriver(2, total=SLOT_BYTES - 1)
    with pytest.raises(ResourceError, match=r"GPU-00000000 has no room .* lower device\.slot_bytes"):
        async with made(driver):
            pytest.fail("opened")
    assert (driver.allocated, driver.retained) == ({}, [])


async def test_arena_that_cannot_be_pinned_is_refused_with_what_to_do(made: Made) -> None:
    driver = FakeDriver(1)

    def refuse(address: int, nbytes: int) -> None:
        if driver.pins:
            raise bindings.CudaError("cuMemHostRegister_v2", 2, "out of memory (2)")
        driver.pins[address] = nbytes

    driver.register = refuse  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="LimitMEMLOCK"):
        async with made(driver):
            pytest.fail("opened")
    assert (driver.allocated, driver.pins, driver.retained) == ({}, {}, [])


async def test_gpu_that_fails_says_so_and_the_others_go_on(made: Made) -> None:
    driver = FakeDriver(2)
    async with made(driver) as device:
        driver.lost.add(0)
        with pytest.raises(ResourceError, match="launch failure"):
            await device.fetch(0, 0, [Copy(HERE, 0, 0, 64)])
        assert device.stuck_seconds == 0.0
        await device.fetch(1, 0, [Copy(HERE, 0, 0, 64)])
        assert held(driver, device, 1, 0)[:64] == arena_bytes(0, 64)


async def test_gpu_whose_context_is_dead_is_given_up_and_one_with_a_bad_call_is_not(made: Made) -> None:
    driver = FakeDriver(2)
    async with made(driver) as device:
        with pytest.raises(ResourceError, match="invalid argument"):
            await device.fetch(1, 0, [Copy(HERE, ARENA_BYTES, 0, 64)])
        assert device.failures == {}
        driver.lost.add(0)
        with pytest.raises(ResourceError, match="GPU-00000000"):
            await device.fetch(0, 0, [Copy(HERE, 0, 0, 64)])
        assert list(device.failures) == [0]
        assert "restarted" in device.failures[0].message
        await device.fetch(1, 0, [Copy(HERE, 0, 0, 64)])


async def test_daemon_hears_once_that_no_gpu_takes_its_calls_any_more(made: Made) -> None:
    """One context may take all others of the process with it."""
    driver, heard = FakeDriver(2), list[str]()
    async with made(driver, on_lost=lambda: heard.append("lost")) as device:
        driver.lost.add(0)
        with pytest.raises(ResourceError, match="GPU-00000000"):
            await device.fetch(0, 0, [Copy(HERE, 0, 0, 64)])
        assert (list(device.failures), heard) == ([0], [])
        driver.lost.add(1)
        failing = [device.fetch(gpu, 0, [Copy(HERE, 0, 0, 64)]) for gpu in (0, 1)]
        assert all(isinstance(error, ResourceError) for error in await asyncio.gather(*failing, return_exceptions=True))
        assert (sorted(device.failures), heard) == ([0, 1], ["lost"])


async def test_copy_that_cannot_be_issued_ends_with_what_was_issued_before_it(made: Made) -> None:
    driver = FakeDriver(1)
    async with made(driver) as device:
        with pytest.raises(ResourceError, match="invalid argument"):
            await device.fetch(0, 0, [Copy(HERE, 0, 0, 64), Copy(HERE, ARENA_BYTES, 64, 64)])
        assert held(driver, device, 0, 0)[:64] == arena_bytes(0, 64)
        assert device.stuck_seconds == 0.0
        await device.fetch(0, 0, [Copy(HERE, 64, 0, 64)])
        assert held(driver, device, 0, 0)[:64] == arena_bytes(64, 64)


async def test_gpus_joined_by_nvlink_exchange_and_others_do_not(made: Made) -> None:
    driver = FakeDriver(2)
    async with made(driver) as device:
        assert device.topology.peer_access
        assert driver.peers == {(0, 1), (1, 0)}
        await device.fetch(0, 0, [Copy(HERE, 0, 0, 64)])
        await device.exchange(1, 0, [PeerCopy(0, 0, 64)])
        assert held(driver, device, 1, 0)[:64] == arena_bytes(0, 64)
    async with made(FakeDriver(2, nvlink=False)) as device:
        assert not device.topology.peer_access


async def test_only_the_gpus_that_are_named_are_taken(made: Made) -> None:
    driver = FakeDriver(3)
    async with made(driver, uuids=("GPU-00000002",)) as device:
        assert [gpu.uuid for gpu in device.topology.gpus] == ["GPU-00000002"]
        assert driver.retained == [2]


@pytest.mark.parametrize("gpus", [0, 3])
async def test_gpu_that_is_not_here_may_be_here_later(gpus: int, made: Made) -> None:
    """It has failed, or its driver is being replaced: whoever started the daemon tries again."""
    with pytest.raises(ResourceError, match="GPU-7, and the driver shows" if gpus else "no GPU to this process"):
        async with made(FakeDriver(gpus), uuids=("GPU-7",)):
            pytest.fail("opened")


@pytest.mark.parametrize("name", ["0", "gpu-7", "MIG-1234", "GPU-x", "NVIDIA H200"])
async def test_name_that_no_gpu_can_have_is_a_setting_to_mend(name: str, made: Made) -> None:
    with pytest.raises(ConfigError, match="not how a GPU's UUID begins"):
        async with made(FakeDriver(1), uuids=(name,)):
            pytest.fail("opened")


async def test_gpu_that_cannot_be_used_now_may_be_used_later(made: Made) -> None:
    driver = FakeDriver(1)

    def refuse(device: int) -> int:
        raise bindings.CudaError("cuDevicePrimaryCtxRetain", 2, "out of memory (2)")

    driver.retain = refuse  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match=r"a GPU cannot be used: .*out of memory.*nvidia-smi"):
        async with made(driver):
            pytest.fail("opened")


async def test_driver_that_is_not_there_now_may_be_there_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> FakeDriver:
        raise ResourceError("no NVIDIA driver here")

    monkeypatch.setattr(module, "driver", missing)
    with pytest.raises(ResourceError, match="no NVIDIA driver here"):
        CudaDevice(uuids=(), slot_bytes=SLOT_BYTES, source=0, source_bytes=ARENA_BYTES)


def test_host_without_a_driver_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "LIBRARY", "libcuda-that-is-not-there.so")
    with pytest.raises(ResourceError, match=r"device\.kind to shm"):
        bindings.driver.__wrapped__()


@pytest.mark.parametrize(("written", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None)])
def test_numa_node_of_a_gpu_is_what_the_host_says(written: str, node: int | None, tmp_path: Path) -> None:
    (tmp_path / "0000:1a:00.0").mkdir()
    (tmp_path / "0000:1a:00.0" / "numa_node").write_text(written)
    assert numa_node("0000:1A:00.0", tmp_path) == node
    assert numa_node("0000:1B:00.0", tmp_path) is None


async def test_exchange_does_not_wait_for_ever_for_a_fetch_that_is_not_issued(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ISSUE_SECONDS", 0.01)
    async with made(FakeDriver(2)) as device:
        device._fetches[1, 0] = Future()
        with pytest.raises(ResourceError, match="were not issued within"):
            await device.exchange(0, 0, [PeerCopy(1, 0, 64)])
        device._fetches.clear()

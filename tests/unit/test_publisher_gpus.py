"""Tensors in GPUs at the trainer: straight into page-locked places, by several threads, and announced when there."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from torch import Tensor
from xxhash import xxh3_128_digest

from cpe_daemon.core.fold import modulo
from cpe_daemon.core.manifest import layout, merge
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.devices.cuda.driver import CudaError
from cpe_daemon.devices.cuda.fold import Stretch
from cpe_daemon.devices.memory import SharedMemory, address_of
from cpe_daemon.errors import CpeError
from cpe_daemon.ingest.fold import fold_seams
from cpe_daemon.publisher import Publisher
from cpe_daemon.publisher import gpus as gpus_module
from cpe_daemon.publisher import publisher as publisher_module
from cpe_daemon.publisher.folding import folding_of
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.pagelock import PageLock
from cpe_daemon.publisher.sources import Contribution
from cpe_daemon.publisher.stream import Pouring, digest, pour
from cpe_daemon.publisher.window import Window
from tests.unit.fake_daemon import WAIT_SECONDS, FakeDaemon
from tests.unit.fake_gpus import FakeGpus, TrainerDriver
from tests.unit.tensor_zoo import bytes_of, tensor_of, zoo
from tests.unit.test_fold import cut_tensors, random_tensors, reference, shared

# The first frame that is sent without a copy starts pyzmq's own thread, which stays: not a leak of ours.
zmq.Frame(bytes(1 << 20), copy=False)

CHUNK_BYTES = 4096


class Places:
    """A sink with so many dirty places that are used again and again; page-locked ones, if a driver is given."""

    in_order = False

    def __init__(self, places: int, total_bytes: int, driver: TrainerDriver | None = None) -> None:
        self._memory = memoryview(bytearray(b"\xee" * places * CHUNK_BYTES))
        self._free = list(range(places))
        self._taken: dict[int, int] = {}
        self._changed = threading.Condition()
        self.content = bytearray(total_bytes)
        self.order: list[int] = []
        self.locked = driver is not None
        if driver is not None:
            driver.use(1)
            driver.register(address_of(self._memory), self._memory.nbytes)

    def window(self, offset: int, nbytes: int) -> Window:
        with self._changed:
            assert self._changed.wait_for(lambda: self._free, WAIT_SECONDS)
            place = self._taken[offset] = self._free.pop(0)
        view = self._memory[place * CHUNK_BYTES :][:nbytes]
        return Window(address_of(view), view, self.locked)

    def filled(self, offset: int, nbytes: int) -> None:
        with self._changed:
            place = self._taken.pop(offset)
            view = self._memory[place * CHUNK_BYTES :][:nbytes]
            self.content[offset : offset + nbytes] = view
            view[:] = b"\xee" * nbytes
            self.order.append(offset // CHUNK_BYTES)
            self._free.append(place)
            self._changed.notify()


def mixed(driver: TrainerDriver, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of many sizes, here and in all GPUs, contiguous or not, in any order."""
    chance = random.Random(seed)
    tensors = dict(zoo())
    for at in range(30):
        tensors[f"small{at}"] = tensor_of("uint8", chance.randrange(600), seed=at)
    for at in range(4):
        tensors[f"large{at}"] = tensor_of("int16", chance.randrange(5_000, 30_000), seed=at)
        tensors[f"turned{at}"] = tensor_of("int32", 60, 40, seed=at)
    for at, (name, tensor) in enumerate(tensors.items()):
        if tensor.is_contiguous() and at % 4 and not (tensor.is_conj() or tensor.is_neg() or tensor.requires_grad):
            tensors[name] = driver.put(tensor, at % driver.gpus)
        if name.startswith("turned"):
            tensors[name] = tensors[name].t()
    return tensors


def whole(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(plain + bytes(-len(plain) % 256) for plain in map(bytes_of, tensors.values()))


def digests_of(tensors: dict[str, Tensor]) -> bytes:
    from xxhash import xxh3_128_digest

    return b"".join(xxh3_128_digest(bytes_of(tensor)) for tensor in tensors.values())


# --- pouring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("gpus", [1, 3])
def test_pour_fetches_what_is_anywhere(threads: int, locked: bool, gpus: int, no_leaks: None) -> None:
    driver = TrainerDriver(gpus)
    tensors = mixed(driver)
    contribution = Contribution.of(tensors.items())
    sink = Places(3, contribution.layout.nbytes, driver if locked else None)
    pins = dict(driver.pins)
    assert pour(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), threads)) == digests_of(tensors)
    assert sink.content == whole(tensors)
    assert sorted(set(driver.settled)) == list(range(gpus))
    assert (driver.pins, driver.streams, driver.events, driver.retained) == (pins, set(), set(), [])


@pytest.mark.parametrize("threads", [1, 4])
def test_digest_of_what_is_in_gpus_leaves_nothing(threads: int, no_leaks: None) -> None:
    driver = TrainerDriver(2)
    tensors = mixed(driver)
    contribution, pins = Contribution.of(tensors.items()), dict(driver.pins)
    assert digest(contribution, Pouring(FakeGpus(driver), threads)) == digests_of(tensors)
    assert (driver.pins, driver.streams, driver.events, driver.retained) == (pins, set(), set(), [])


@pytest.mark.parametrize("threads", [2, 5])
def test_pour_of_host_tensors_in_threads_needs_no_driver(threads: int) -> None:
    tensors = {f"t{at}": tensor_of("uint8", 3000 * at % 20_000, seed=at) for at in range(40)}
    contribution = Contribution.of(tensors.items())
    sink = Places(2, contribution.layout.nbytes)
    driver = TrainerDriver(0)
    assert pour(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), threads)) == digests_of(tensors)
    assert sink.content == whole(tensors)


def test_chunk_is_sent_only_when_its_copies_have_happened() -> None:
    driver = TrainerDriver()
    tensors = {"a": driver.put(tensor_of("uint8", CHUNK_BYTES))}
    contribution = Contribution.of(tensors.items())
    sink = Places(1, contribution.layout.nbytes, driver)
    driver.go_on.clear()
    pouring = threading.Thread(target=pour, args=(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), 1)))
    pouring.start()
    assert driver.awaited.wait(WAIT_SECONDS)
    assert sink.order == []
    driver.go_on.set()
    pouring.join(WAIT_SECONDS)
    assert sink.content == whole(tensors)


def test_several_chunks_are_on_their_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = TrainerDriver()
    tensors = {f"t{at}": driver.put(tensor_of("uint8", CHUNK_BYTES, seed=at)) for at in range(8)}
    contribution = Contribution.of(tensors.items())
    sink = Places(4, contribution.layout.nbytes, driver)
    issued = threading.Semaphore(0)
    copying = driver.copy_to_host

    def copy_to_host(destination: int, source: int, nbytes: int, stream: int) -> None:
        copying(destination, source, nbytes, stream)
        issued.release()

    monkeypatch.setattr(driver, "copy_to_host", copy_to_host)
    driver.go_on.clear()
    pouring = threading.Thread(target=pour, args=(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), 4)))
    pouring.start()
    assert all(issued.acquire(timeout=WAIT_SECONDS) for _ in range(4))
    driver.go_on.set()
    pouring.join(WAIT_SECONDS)
    assert sink.content == whole(tensors)


def test_callers_kernels_are_awaited_before_anything_is_read() -> None:
    driver = TrainerDriver()
    tensor = driver.put(torch.zeros(1000, dtype=torch.uint8))

    class Writing(FakeGpus):
        def settle(self, device: int) -> None:
            super().settle(device)
            tensor.fill_(7)  # what a kernel was still about to do

    contribution = Contribution.of([("a", tensor)])
    sink = Places(1, contribution.layout.nbytes, driver)
    pour(contribution, sink, CHUNK_BYTES, Pouring(Writing(driver), 1))
    assert sink.content[:1000] == b"\7" * 1000


def test_host_that_locks_no_pages_copies_all_the_same_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    driver = TrainerDriver()
    tensors = {f"t{at}": driver.put(tensor_of("uint8", 3000 * at, seed=at)) for at in range(1, 9)}
    contribution = Contribution.of(tensors.items())
    driver.locks = False
    sink = Places(2, contribution.layout.nbytes)
    with caplog.at_level(logging.WARNING, gpus_module.__name__):
        pour(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), 3))
    assert sink.content == whole(tensors)
    assert driver.pageable == sum(tensor.nbytes for tensor in tensors.values())
    (said,) = caplog.messages
    assert "ulimit -l" in said
    assert driver.at_rest()


@pytest.mark.parametrize("threads", [1, 3])
def test_gpu_that_fails_ends_the_pouring_and_leaves_nothing(threads: int, no_leaks: None) -> None:
    driver = TrainerDriver(2)
    tensors = {f"t{at}": driver.put(tensor_of("uint8", 9000, seed=at), at % 2) for at in range(10)}
    contribution = Contribution.of(tensors.items())
    sink = Places(3, contribution.layout.nbytes)
    driver.lost.add(1)
    with pytest.raises(CudaError, match="unspecified launch failure"):
        pour(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), threads))
    assert driver.at_rest()


def test_progress_is_told_by_the_calling_thread_and_may_end_it(no_leaks: None) -> None:
    driver = TrainerDriver()
    tensors = {f"t{at}": driver.put(tensor_of("uint8", 9000, seed=at)) for at in range(20)}
    contribution = Contribution.of(tensors.items())
    told: list[tuple[int, int]] = []

    def progress(nbytes: int) -> None:
        told.append((threading.get_ident(), nbytes))

    sink = Places(3, contribution.layout.nbytes)
    pour(contribution, sink, CHUNK_BYTES, Pouring(FakeGpus(driver), 3, progress))
    assert {thread for thread, _ in told} == {threading.get_ident()}
    assert sum(nbytes for _, nbytes in told) == contribution.layout.nbytes

    def enough(nbytes: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pour(contribution, Places(3, contribution.layout.nbytes), CHUNK_BYTES, Pouring(FakeGpus(driver), 3, enough))
    assert driver.at_rest()


def test_longest_runs_come_first_where_order_does_not_matter() -> None:
    tensors = {"small": tensor_of("uint8", 16 * CHUNK_BYTES), "large": tensor_of("uint8", 40 * CHUNK_BYTES)}
    contribution = Contribution.of(tensors.items())
    for in_order, first in ((False, 16), (True, 0)):
        sink = Places(1, contribution.layout.nbytes)
        sink.in_order = in_order
        driver = TrainerDriver()
        tensors["small"] = driver.put(tensors["small"])  # a thread, though it is a single one
        pour(Contribution.of(tensors.items()), sink, CHUNK_BYTES, Pouring(FakeGpus(driver), 1))
        assert sink.order[0] == first


# --- page-locking ----------------------------------------------------------------------------------------------------


def test_page_lock_lasts_until_it_is_closed_and_nobody_copies_there(no_leaks: None) -> None:
    driver = TrainerDriver()
    memory = SharedMemory.create("cpe-test", 1 << 16)
    lock = PageLock(FakeGpus(driver), 0, memory)
    assert driver.pins == {memory.address: 1 << 16}
    assert lock.hold()
    assert lock.hold()
    lock.close()
    memory.close()
    assert not lock.hold()
    lock.let_go()
    assert driver.pins
    lock.let_go()
    assert driver.at_rest()
    lock.close()


def test_page_lock_that_is_refused_leaves_nothing(no_leaks: None) -> None:
    driver = TrainerDriver()
    driver.locks = False
    memory = SharedMemory.create("cpe-test", 1 << 16)
    with pytest.raises(CudaError):
        PageLock(FakeGpus(driver), 0, memory)
    memory.close()
    assert driver.at_rest()


# --- a publisher -----------------------------------------------------------------------------------------------------

MakeDaemon = Callable[..., FakeDaemon]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> TrainerDriver:
    """The driver that publishers find."""
    fake = TrainerDriver(2)
    monkeypatch.setattr(publisher_module, "Gpus", lambda: FakeGpus(fake))
    monkeypatch.setattr(publisher_module, "threads_here", lambda: 3)
    return fake


@pytest.fixture
def make_daemon(runtime_dir: Path) -> Iterator[MakeDaemon]:
    daemons: list[FakeDaemon] = []

    def make(name: str = "front", **terms: Any) -> FakeDaemon:
        daemons.append(FakeDaemon(runtime_dir, name, **terms))
        return daemons[-1].start()

    yield make
    for daemon in daemons:
        daemon.stop()
    assert [violation for daemon in daemons for violation in daemon.violations] == []


def publisher(*daemons: FakeDaemon) -> Publisher:
    endpoints = [daemon.endpoint for daemon in daemons]
    return Publisher(endpoints, model="m", run="r", connect_timeout=WAIT_SECONDS, send_timeout=WAIT_SECONDS)


def locked(driver: TrainerDriver, rings: int = 1) -> None:
    """Wait until so many rings are page-locked: links do it by themselves, within a moment."""
    moment = threading.Event()
    for _ in range(2000):
        if len(driver.pins) >= rings:
            return
        moment.wait(0.01)
    raise AssertionError("no ring was page-locked")


@pytest.mark.parametrize("landing", [True, False])
@pytest.mark.parametrize("iterator", [False, True])
def test_publish_delivers_from_gpus(
    no_leaks: None, driver: TrainerDriver, make_daemon: MakeDaemon, landing: bool, iterator: bool
) -> None:
    daemon = make_daemon(landing=landing, chunk_bytes=CHUNK_BYTES)
    tensors = mixed(driver)
    with publisher(daemon) as pub:
        for version in (1, 2):
            pub.publish(iter(tensors.items()) if iterator else tensors, version).staged(WAIT_SECONDS)
            assert daemon.last.tensors() == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert driver.at_rest()


def test_ring_is_page_locked_at_attach_and_copied_to_directly(driver: TrainerDriver, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(chunk_bytes=CHUNK_BYTES)
    tensors = {f"t{at}": driver.put(tensor_of("uint8", 9000, seed=at)) for at in range(10)}
    with publisher(daemon) as pub:
        locked(driver)
        assert sum(driver.pins.values()) == daemon.credits * CHUNK_BYTES
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
        assert driver.direct == 10 * 9000
        assert driver.pageable == 0
    assert daemon.last.tensors() == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert driver.at_rest()


def test_trainer_without_cuda_is_given_none(driver: TrainerDriver, make_daemon: MakeDaemon) -> None:
    with publisher(make_daemon()) as pub:
        pub.publish({"a": torch.ones(10_000)}, 1).staged(WAIT_SECONDS)
        assert driver.pins == {}
        assert driver.retained == []


def test_ring_is_page_locked_once_the_trainer_uses_cuda(driver: TrainerDriver, make_daemon: MakeDaemon) -> None:
    with publisher(make_daemon()) as pub:
        pub.publish({"a": torch.ones(10)}, 1).staged(WAIT_SECONDS)
        driver.active.add(1)
        locked(driver)
        assert driver.retained == [1]  # and not GPU 0, which this process does not use
    assert driver.at_rest()


def test_ring_that_cannot_be_page_locked_is_used_all_the_same(
    driver: TrainerDriver, make_daemon: MakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = make_daemon(chunk_bytes=CHUNK_BYTES)
    tensors = {"a": driver.put(tensor_of("uint8", 9000))}
    driver.locks = False
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == {"a": bytes_of(tensors["a"])}
    assert len([said for said in caplog.messages if "memlock" in said]) == 1
    assert driver.at_rest()


def test_rings_of_several_daemons_are_filled_at_once(driver: TrainerDriver, make_daemon: MakeDaemon) -> None:
    daemons = [make_daemon(name, chunk_bytes=CHUNK_BYTES, credits=2) for name in ("one", "two")]
    tensors = mixed(driver)
    with publisher(*daemons) as pub:
        locked(driver, 2)
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    for daemon in daemons:
        assert daemon.last.tensors() == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert driver.at_rest()


def test_gpu_that_fails_fails_the_version(driver: TrainerDriver, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(chunk_bytes=CHUNK_BYTES)
    tensors = {f"t{at}": driver.put(tensor_of("uint8", 9000, seed=at)) for at in range(10)}
    with publisher(daemon) as pub:
        driver.lost.add(0)
        with pytest.raises(CudaError, match="launch failure"):
            pub.publish(tensors, 1)
        driver.lost.clear()
        pub.publish(tensors, 2).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert driver.at_rest()


def test_daemon_that_ends_while_a_gpu_copies_leaves_the_ring_locked_until_it_has(
    driver: TrainerDriver, make_daemon: MakeDaemon
) -> None:
    daemon = make_daemon(chunk_bytes=CHUNK_BYTES)
    tensors = {"a": driver.put(tensor_of("uint8", 100 * CHUNK_BYTES))}
    failed: list[CpeError] = []
    with publisher(daemon) as pub:
        locked(driver)
        driver.go_on.clear()

        def publish() -> None:
            try:
                pub.publish(tensors, 1).staged(WAIT_SECONDS)
            except CpeError as error:
                failed.append(error)

        publishing = threading.Thread(target=publish)
        publishing.start()
        assert driver.awaited.wait(WAIT_SECONDS)
        daemon.stop()
        (link,) = pub._links
        with pub._bell.lock:
            assert pub._bell.changed.wait_for(lambda: link._session is None, WAIT_SECONDS)
        assert len(driver.pins) == 1
        driver.go_on.set()
        publishing.join(WAIT_SECONDS)
        assert failed
    assert driver.at_rest()


@pytest.mark.parametrize("landing", [True, False])
def test_fold_comes_with_the_seal_of_what_is_all_in_gpus(
    driver: TrainerDriver, make_daemon: MakeDaemon, landing: bool
) -> None:
    folding, other = make_daemon("folding", landing=landing, folds=True), make_daemon("other", landing=landing)
    tensors = {f"t{at}": driver.put(tensor_of("int16", 3000 + at, seed=at), at % 2) for at in range(9)}
    with publisher(folding, other) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    expected = reference({name: bytes_of(tensor) for name, tensor in tensors.items()})
    for daemon in (folding, other):
        assert daemon.last.opened.folded
        assert daemon.last.fold == expected
        assert daemon.last.tensors() == {name: bytes_of(tensor) for name, tensor in tensors.items()}


def test_what_is_folded_is_digested_only_for_daemons_that_need_it(
    driver: TrainerDriver, make_daemon: MakeDaemon
) -> None:
    folding, holding = make_daemon("folding", folds=True), make_daemon("holding", folds=True)
    tensors = {f"t{at}": driver.put(tensor_of("int16", 3000 + at, seed=at), at % 2) for at in range(9)}
    with publisher(folding, holding) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
        assert (folding.last.digests, holding.last.digests) == (b"", b"")
        holding.script.held = "staged"
        pub.publish(tensors, 2).staged(WAIT_SECONDS)
    expected = b"".join(xxh3_128_digest(bytes_of(tensor)) for tensor in tensors.values())
    assert (folding.last.digests, holding.last.digests) == (expected, expected)
    assert folding.last.fold == reference({name: bytes_of(tensor) for name, tensor in tensors.items()})


def test_bytes_that_no_fold_of_the_rank_covers_are_digested(
    driver: TrainerDriver, make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon(folds=True)
    half = driver.put(tensor_of("int16", 1000))
    shards = [Shard("a", "int16", (2000,), (0,), (1000,))]  # its last row is half another rank's
    monkeypatch.setattr(publisher_module, "open_source", lambda _: Contribution(shards, layout(shards), [half]))
    with publisher(daemon) as pub:
        pub.publish({"a": half}, 1).staged(WAIT_SECONDS)
    assert daemon.last.opened.folded
    assert daemon.last.digests == xxh3_128_digest(bytes_of(half))


@pytest.mark.parametrize("why", ["nobody folds", "one is here", "one is turned", "one lies askew", "no kernel"])
def test_daemon_is_left_to_fold_what_gpus_do_not(
    driver: TrainerDriver, make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    daemon = make_daemon(folds=why != "nobody folds")
    tensors = {f"t{at}": driver.put(tensor_of("int16", 50, 60, seed=at), at % 2) for at in range(5)}
    if why == "one is here":
        tensors["t2"] = tensor_of("int16", 50, 60)
    if why == "one is turned":
        tensors["t2"] = tensors["t2"].t()
    if why == "one lies askew":
        tensors["t2"] = tensors["t2"].reshape(-1)[1:]
    if why == "no kernel":
        monkeypatch.setattr(publisher_module, "Gpus", lambda: FakeGpus(driver, [1]))
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert not daemon.last.opened.folded
    assert daemon.last.fold is None


@given(cut_tensors())
@settings(deadline=None, max_examples=30)
def test_what_ranks_fold_in_gpus_and_what_lies_around_seams_is_the_fold(
    cut_up: tuple[dict[str, bytes], list[list[int]]],
) -> None:
    tensors, cuts = cut_up
    driver = TrainerDriver()
    gpus, total, extents, ranks = FakeGpus(driver), 0, [], shared(tensors, cuts)
    for rank in ranks:
        shards = [shard for shard, _ in rank]
        plan = layout(shards)
        extent = bytearray(b"\xee" * plan.nbytes)
        for (_, data), offset in zip(rank, plan.offsets, strict=True):
            extent[offset : offset + len(data)] = data
        extents.append(memoryview(extent))
        lie = [
            driver.put(torch.frombuffer(bytearray(data or b"."), dtype=torch.uint8)[: len(data)]) for _, data in rank
        ]
        folding = folding_of(Contribution(shards, plan, lie), gpus)
        assert folding is not None
        total += folding()
    manifest = merge(VersionId("m", "r", 1), [[shard for shard, _ in rank] for rank in ranks])
    assert modulo(total + fold_seams(manifest.tensors, extents)) == reference(tensors)


@pytest.mark.gpu
def test_fold_of_tensors_wherever_they_lie_in_a_gpu_is_the_reference() -> None:
    gpus = Gpus()
    assert gpus.folds(0)
    for sizes in ([0, 1, 7, 16, 17, 777, 5000, 300_000, 256], [3_000_001, 16, 255], [64] * 300):
        tensors = random_tensors(sizes, seed=len(sizes))
        lie = [
            (name, torch.frombuffer(bytearray(data or b"."), dtype=torch.uint8).cuda(), data)
            for name, data in tensors.items()
        ]
        stretches = [Stretch(name, 0, tensor.data_ptr(), len(data)) for name, tensor, data in lie if data]
        for _ in range(2):
            assert gpus.fold(0, stretches) == reference(tensors)

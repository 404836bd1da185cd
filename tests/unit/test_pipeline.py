"""The three stages over K slots: what overlaps, what waits for what, and what stops all of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.pace import Prefill
from cpe_daemon.core.plan import HERE, Bucket, Copy, Gpu, PeerCopy, Topology, Transfers
from cpe_daemon.errors import CpeError, EngineError, ResourceError
from cpe_daemon.push.pipeline import Pipeline
from cpe_daemon.push.traffic import Traffic
from cpe_daemon.wire.messages import SlotSet

WAIT_SECONDS = 20.0

Op = tuple[str, int, int, int]
"""(stage, bucket, slot, GPU); a load concerns all GPUs and says -1."""


def buckets_of(count: int, gpus: int = 1) -> list[Bucket]:
    """Buckets whose copies tell which bucket they belong to: by the address, and by the peer copy's offset."""
    return [
        Bucket(
            index=index,
            nbytes=256,
            parts=(),
            pulls=tuple((Copy(HERE, index, 0, 256),) for _ in range(gpus)),
            exchanges=tuple(
                tuple(PeerCopy(other, index, 256) for other in range(gpus) if other != gpu) for gpu in range(gpus)
            ),
        )
        for index in range(count)
    ]


@dataclass
class FakeDevice:
    """Slots without bytes. An operation begins, waits until the test lets it end, and says what was wrong with it."""

    slot_count: int = 3
    gpus: int = 1
    kind: str = "fake"
    slot_bytes: int = 256
    stuck_seconds: float = 0.0
    trace: list[tuple[str, Op]] = field(default_factory=list)
    active: dict[Op, asyncio.Future[None]] = field(default_factory=dict)
    fills: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    loading: dict[int, int] = field(default_factory=dict)
    hold: Callable[[Op], bool] = lambda op: False
    """Which operations wait to be ended; others end by themselves."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.topology = Topology(tuple(Gpu(f"fake-{index}") for index in range(self.gpus)), peer_access=True)

    @property
    def failures(self) -> dict[int, CpeError]:
        return {}

    async def open(self, progress: Callable[[int, int], None]) -> None:
        """Nothing to pin."""

    def slots(self, gpu: int) -> int:
        return self.slot_count

    async def take(self, gpu: int, count: int) -> None:
        raise NotImplementedError

    async def release(self, gpu: int) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to free."""

    def export(self, gpu: int) -> SlotSet:
        raise NotImplementedError

    def withdraw(self, slots: SlotSet) -> None:
        raise NotImplementedError

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        bucket = copies[0].address
        assert slot not in self.loading, f"slot {slot} is filled anew while bucket {self.loading[slot]} is loaded"
        self.fills[gpu, slot] = [bucket]
        await self.operate(("fetch", bucket, slot, gpu))

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        bucket = copies[0].slot_offset
        for peer_copy in copies:
            assert self.fills[peer_copy.gpu, slot] == [bucket], "an exchange from a slot that holds another bucket"
        fetches = [("fetch", bucket, slot, peer_copy.gpu) for peer_copy in copies]
        await asyncio.wait([self.active[fetch] for fetch in fetches if fetch in self.active] or [_done()])
        for _ in range(2):
            await asyncio.sleep(0)  # the fetch's task notes its end
        assert all(("end", fetch) in self.trace for fetch in fetches)
        await self.operate(("exchange", bucket, slot, gpu))

    def deliver(self, bucket: Bucket, slot: int) -> Awaitable[None]:
        assert all(held == [bucket.index] for (_, at), held in self.fills.items() if at == slot)
        assert slot not in self.loading
        self.loading[slot] = bucket.index
        return self._load(bucket, slot)

    async def _load(self, bucket: Bucket, slot: int) -> None:
        await self.operate(("load", bucket.index, slot, -1))
        del self.loading[slot]

    async def operate(self, op: Op) -> None:
        assert op not in self.active
        self.note("begin", op)
        future = self.active[op] = asyncio.get_running_loop().create_future()
        if not self.hold(op):
            future.set_result(None)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            if op[0] != "load":  # a copy that is told to stop has not stopped: see the Device protocol
                await asyncio.wait([future])
            raise
        finally:
            del self.active[op]
            self.note("end", op)

    def note(self, what: str, op: Op) -> None:
        self.trace.append((what, op))
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def begun(self, stage: str) -> list[int]:
        return [op[1] for what, op in self.trace if (what, op[0]) == ("begin", stage)]

    def running(self) -> set[tuple[str, int]]:
        return {op[:2] for op in self.active}

    def end(self, stage: str, bucket: int) -> None:
        for op, future in self.active.items():
            if op[:2] == (stage, bucket):
                future.set_result(None)

    def fail(self, stage: str, bucket: int, error: Exception) -> None:
        next(future for op, future in self.active.items() if op[:2] == (stage, bucket)).set_exception(error)


def _done() -> asyncio.Future[None]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def pipeline_over(
    device: FakeDevice, count: int, gpus: Sequence[int] | None = None, prefill: Prefill | None = None
) -> Pipeline:
    taking = list(range(device.gpus)) if gpus is None else list(gpus)
    return Pipeline(device, taking, buckets_of(count, len(taking)), device.deliver, prefill=prefill)


async def finished(work: Awaitable[object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        await work


# --- order and slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
async def test_every_bucket_is_delivered_once_in_order(count: int, slots: int, gpus: int) -> None:
    device = FakeDevice(slots, gpus)
    pipeline = pipeline_over(device, count)
    pipeline.open()
    await finished(pipeline.run())
    assert device.begun("load") == list(range(count))
    assert sorted(device.begun("fetch")) == sorted(list(range(count)) * gpus)
    assert not device.active
    await finished(pipeline.primed())


@given(data=st.data(), slots=st.integers(1, 4), gpus=st.integers(1, 3), count=st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slot_is_not_filled_anew_before_it_is_let_go(data: st.DataObject, slots: int, gpus: int, count: int) -> None:
    """Operations end in any order; `FakeDevice` refuses what a real one would not survive."""
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))

    async def run() -> None:
        device = FakeDevice(slots, gpus, hold=lambda op: True)
        pipeline = pipeline_over(device, count)
        open_after = rng.randrange(4)
        ended = 0
        running = asyncio.create_task(pipeline.run())
        while not running.done():
            held = [future for future in device.active.values() if not future.done()]
            if held:
                rng.choice(held).set_result(None)
                ended += 1
            if ended >= open_after or not held:
                pipeline.open()
            await asyncio.sleep(0)
            assert len({op[2] for op in device.active}) <= slots
        running.result()
        assert device.begun("load") == list(range(count))

    asyncio.run(asyncio.wait_for(run(), WAIT_SECONDS))


async def test_buckets_that_are_filled_out_of_order_are_delivered_in_order() -> None:
    device = FakeDevice(3, hold=lambda op: op[0] == "fetch")
    pipeline = pipeline_over(device, 3)
    pipeline.open()
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: len(device.active) == 3)
    for bucket in (2, 1, 0):
        assert device.begun("load") == []
        device.end("fetch", bucket)
        await device.until(lambda bucket=bucket: ("fetch", bucket) not in device.running())  # type: ignore[misc]
    await finished(running)
    assert device.begun("load") == [0, 1, 2]


async def test_one_slot_makes_it_serial() -> None:
    device = FakeDevice(1, 1)
    pipeline = pipeline_over(device, 3)
    pipeline.open()
    await finished(pipeline.run())
    stages = [(what, op[0], op[1]) for what, op in device.trace]
    assert stages == [
        (what, stage, bucket) for bucket in range(3) for stage in ("fetch", "load") for what in ("begin", "end")
    ]


async def test_slot_of_a_bucket_waits_for_every_gpu() -> None:
    device = FakeDevice(1, 2, hold=lambda op: op == ("fetch", 0, 0, 1))
    pipeline = pipeline_over(device, 1)
    pipeline.open()
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: ("end", ("fetch", 0, 0, 0)) in device.trace)
    assert device.begun("exchange") == []
    device.end("fetch", 0)
    await finished(running)
    assert device.begun("exchange") == [0, 0]


async def test_gpus_that_take_part_are_named_as_the_device_names_them() -> None:
    """The plan counts two GPUs, 0 and 1; at the device they are 3 and 1."""
    device = FakeDevice(1, 4)
    pipeline = pipeline_over(device, 1, gpus=[3, 1])
    pipeline.open()
    await finished(pipeline.run())
    assert {op[3] for _, op in device.trace if op[0] == "fetch"} == {1, 3}
    assert {op[3] for _, op in device.trace if op[0] == "exchange"} == {1, 3}


# --- overlap ---------------------------------------------------------------------------------------------------------


async def test_three_stages_run_at_once() -> None:
    """While bucket 0 is loaded, bucket 1 is exchanged and bucket 2 is fetched."""
    meeting = {("load", 0), ("exchange", 1), ("fetch", 2)}
    device = FakeDevice(3, 2, hold=lambda op: op[:2] in meeting)
    pipeline = pipeline_over(device, 3)
    pipeline.open()
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: device.running() == meeting)
    for op in meeting:
        device.end(*op)
    await finished(running)


async def test_slots_fill_before_the_engines_may_load() -> None:
    device = FakeDevice(3, 2)
    pipeline = pipeline_over(device, 5)
    running = asyncio.create_task(pipeline.run())
    await finished(pipeline.primed())
    assert sorted(set(device.begun("exchange"))) == [0, 1, 2]
    assert device.begun("load") == []
    assert not device.active
    pipeline.open()
    await finished(running)
    assert device.begun("load") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("count", "slots"), [(2, 3), (3, 3), (9, 3), (1, 1)])
async def test_primed_when_all_slots_are_full_or_hold_all_there_is(count: int, slots: int) -> None:
    last = min(count, slots) - 1
    device = FakeDevice(slots, hold=lambda op: op[:2] == ("fetch", last))
    pipeline = pipeline_over(device, count)
    running = asyncio.create_task(pipeline.run())
    waiting = asyncio.create_task(pipeline.primed())
    await device.until(lambda: device.running() == {("fetch", last)})
    assert not waiting.done()
    device.end("fetch", last)
    await finished(waiting)
    pipeline.open()
    await finished(running)


@pytest.mark.parametrize(("prefill", "count", "full"), [(1, 9, 1), (2, 9, 2), (9, 9, 3), (2, 1, 1)])
async def test_primed_when_as_many_slots_are_full_as_were_asked_for(prefill: int, count: int, full: int) -> None:
    """The others fill while the engines pause."""
    device = FakeDevice(3, hold=lambda op: op[0] == "fetch" and op[1] >= full - 1)
    pipeline = pipeline_over(device, count, prefill=Prefill(prefill))
    running = asyncio.create_task(pipeline.run())
    waiting = asyncio.create_task(pipeline.primed())
    await device.until(lambda: ("fetch", full - 1) in device.running() and len(device.begun("fetch")) == min(3, count))
    assert not waiting.done()
    device.end("fetch", full - 1)
    await finished(waiting)
    assert device.begun("load") == []
    device.hold = lambda op: False
    for _, bucket in device.running():
        device.end("fetch", bucket)
    pipeline.open()
    await finished(running)
    assert device.begun("load") == list(range(count))


@pytest.mark.parametrize("full", [0, 1])
async def test_primed_a_while_after_so_many_slots_are_full(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills while the engines pause is no whole number of slots."""
    asked = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda *asked_for: asked.set_result(asked_for))
    pipeline = pipeline_over(FakeDevice(3), 9, prefill=Prefill(full, 0.5))
    running = asyncio.create_task(pipeline.run())
    waiting = asyncio.create_task(pipeline.primed())
    seconds, wake = await asked
    assert seconds == 0.5
    assert not waiting.done()
    wake()
    await finished(waiting)
    pipeline.open()
    await finished(running)


async def test_nothing_to_carry_is_primed_at_once() -> None:
    pipeline = pipeline_over(FakeDevice(), 0)
    running = asyncio.create_task(pipeline.run())
    await finished(pipeline.primed())
    await finished(running)
    await finished(pipeline.run())


@pytest.mark.parametrize("slow", ["fetch", "load"])
async def test_engines_starve_when_slots_fill_more_slowly_than_they_load(slow: str) -> None:
    """The slow stage goes on only when nothing else is going on."""
    device = FakeDevice(3, hold=lambda op: op[0] == slow)
    pipeline = pipeline_over(device, 9)
    pipeline.open()
    running = asyncio.create_task(pipeline.run())
    for bucket in range(9):
        ahead = min(9, bucket + 3)
        await device.until(lambda ahead=ahead: len(device.begun("fetch")) == ahead)  # type: ignore[misc]
        await device.until(lambda: {stage for stage, _ in device.running()} == {slow})
        device.end(slow, bucket)
        await device.until(lambda bucket=bucket: (slow, bucket) not in device.running())  # type: ignore[misc]
    await finished(running)
    assert pipeline.starved is (slow == "fetch")


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_whether_engines_starve_is_unknown_where_slots_hold_all_there_is(count: int) -> None:
    pipeline = pipeline_over(FakeDevice(3), count)
    pipeline.open()
    await finished(pipeline.run())
    assert pipeline.starved is None


# --- the end of it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fetch", "exchange", "load"])
async def test_error_in_a_stage_stops_everything(stage: str) -> None:
    device = FakeDevice(2, 2, hold=lambda op: op[:2] == (stage, 1))
    pipeline = pipeline_over(device, 6)
    pipeline.open()
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: (stage, 1) in device.running())
    error = ResourceError("out of luck")
    for op, future in list(device.active.items()):
        if op[:2] == (stage, 1):
            future.set_exception(error)
    with pytest.raises(ExceptionGroup) as caught:
        await finished(running)
    assert caught.group_contains(ResourceError, match="out of luck")
    assert not device.active
    loaded = device.begun("load")
    assert loaded == list(range(len(loaded)))
    assert stage == "load" or 1 not in loaded
    before = len(device.trace)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(device.trace) == before


async def test_error_of_the_delivery_itself_stops_everything() -> None:
    device = FakeDevice(2)

    def nobody(bucket: Bucket, slot: int) -> Awaitable[None]:
        raise EngineError("no engine is left")

    pipeline = Pipeline(device, [0], buckets_of(4), nobody)
    pipeline.open()
    with pytest.raises(ExceptionGroup) as caught:
        await finished(pipeline.run())
    assert caught.group_contains(EngineError)
    assert not device.active


@pytest.mark.parametrize("failing", ["fetch", "exchange"])
async def test_copy_in_flight_has_ended_when_another_gpu_s_has_failed(failing: str) -> None:
    """Otherwise it could write into a slot that the next round has filled."""
    device = FakeDevice(1, 2, hold=lambda op: op[0] == failing)
    pipeline = pipeline_over(device, 1)
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: len(device.active) == 2)
    device.fail(failing, 0, ResourceError("bytes of node-7 are not on this node"))
    await device.until(lambda: len(device.active) == 1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not running.done()
    device.end(failing, 0)
    with pytest.raises(ExceptionGroup):
        await finished(running)
    assert not device.active


async def test_cancelled_run_ends_when_its_copies_have() -> None:
    device = FakeDevice(3, 2, hold=lambda op: op[0] == "fetch")
    pipeline = pipeline_over(device, 5)
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: len(device.active) == 6)
    running.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not running.done()
    for bucket in range(3):
        device.end("fetch", bucket)
    await asyncio.wait([running], timeout=WAIT_SECONDS)
    assert running.cancelled()
    assert not device.active
    assert device.begun("exchange") == []


# --- what is sent in part --------------------------------------------------------------------------------------------

SLICED = 1000
"""By which copies of slices are known: it is added to the bucket's number."""


def sliced_buckets(count: int, gpus: int) -> list[Bucket]:
    """Buckets that are sent in part, each with one pull a GPU."""
    return [
        replace(bucket, sliced=Transfers(((Copy(HERE, bucket.index + SLICED, 0, 64),),) * gpus, ((),) * gpus))
        for bucket in buckets_of(count, gpus)
    ]


async def test_slices_alone_are_sent_where_engines_need_no_more() -> None:
    device = FakeDevice(2, 2)
    delivered: list[int] = []
    traffic = Traffic(lambda: 0.0)

    async def loaded() -> None:
        """At once."""

    def deliver(bucket: Bucket, slot: int) -> Awaitable[None]:
        assert {device.fills[gpu, slot][0] for gpu in range(2)} == {bucket.index + SLICED}
        delivered.append(bucket.index)
        return loaded()

    pipeline = Pipeline(device, [0, 1], sliced_buckets(5, 2), deliver, traffic)
    pipeline.open()
    await finished(pipeline.run())
    assert delivered == list(range(5))
    assert not device.begun("exchange")
    assert (traffic.fetch.nbytes, traffic.exchange.nbytes) == (5 * 2 * 64, 0)


async def test_slots_that_hold_slices_are_completed_when_engines_need_everything_after_all() -> None:
    """Two are filled by then, and one is being filled."""
    device = FakeDevice(3, 2, hold=lambda op: op[:2] == ("fetch", 2 + SLICED))
    delivered: list[int] = []

    async def loaded() -> None:
        """At once."""

    def deliver(bucket: Bucket, slot: int) -> Awaitable[None]:
        assert {device.fills[gpu, slot][0] for gpu in range(2)} == {bucket.index}
        delivered.append(bucket.index)
        return loaded()

    pipeline = Pipeline(device, [0, 1], sliced_buckets(6, 2), deliver)
    running = asyncio.create_task(pipeline.run())
    await device.until(lambda: len(device.begun("fetch")) == 6)
    pipeline.open(whole=True)
    await device.until(lambda: delivered == [0, 1])
    device.end("fetch", 2 + SLICED)
    await finished(running)
    assert delivered == list(range(6))
    assert sorted(set(device.begun("fetch"))) == [0, 1, 2, 3, 4, 5, SLICED, SLICED + 1, SLICED + 2]

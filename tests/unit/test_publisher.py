"""The publisher against a scripted daemon, over real sockets and landing rings."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor

from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import (
    ArenaFullError,
    BusyError,
    ConfigError,
    CpeError,
    DeadlineError,
    DigestError,
    ManifestError,
    MisuseError,
    PeerError,
    PeerLostError,
    ProtocolError,
    PublishError,
    ResourceError,
    VersionRefusedError,
)
from cpe_daemon.publisher import EndpointsFailedError, Publisher
from cpe_daemon.publisher.delivery import Delivery
from cpe_daemon.publisher.staging import Staging
from cpe_daemon.publisher.window import Window
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    ErrorReply,
    Farewell,
    ManifestPart,
    OpenVersion,
    Pong,
    Seal,
    TrainerBye,
    TrainerHello,
    VersionStatus,
)
from cpe_daemon.wire.reports import ErrorInfo
from tests.unit.fake_daemon import WAIT_SECONDS, FakeDaemon, failed
from tests.unit.tensor_zoo import bytes_of, tensor_of, zoo

# The first frame that is sent without a copy starts pyzmq's own thread, which stays: not a leak of ours.
zmq.Frame(bytes(1 << 20), copy=False)

leaves_nothing = pytest.mark.usefixtures("no_leaks")
"""For one test of each kind: looking for leaks takes longer than what is looked at."""

MakeDaemon = Callable[..., FakeDaemon]


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


@pytest.fixture(params=["landing", "inline"])
def daemon(request: pytest.FixtureRequest, make_daemon: MakeDaemon) -> FakeDaemon:
    return make_daemon(landing=request.param == "landing")


def publisher(*daemons: FakeDaemon, **options: Any) -> Publisher:
    settings = {"model": "m", "run": "r", "connect_timeout": WAIT_SECONDS, "send_timeout": WAIT_SECONDS, **options}
    return Publisher([daemon.endpoint for daemon in daemons], **settings)


def some(chunks: int = 20, chunk_bytes: int = 4096, seed: int = 0) -> dict[str, Tensor]:
    """A tensor that takes so many chunks, and a small one after it."""
    return {"a": tensor_of("uint8", chunks * chunk_bytes - 100, seed=seed), "b": tensor_of("float32", 5, seed=seed + 1)}


def content(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


# --- what arrives ----------------------------------------------------------------------------------------------------


@leaves_nothing
def test_publish_delivers_every_kind_of_tensor(daemon: FakeDaemon) -> None:
    tensors = zoo()
    with publisher(daemon) as pub:
        pub.publish(tensors, version=1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(tensors)
    assert [(shard.name, shard.dtype, shard.shape) for shard in daemon.last.shards] == [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert (daemon.last.inline_chunks == 0) == daemon.landing


def test_publish_pads_with_zeros(daemon: FakeDaemon) -> None:
    with publisher(daemon) as pub:
        pub.publish(some(2), 1).staged(WAIT_SECONDS)
        pub.publish({"x": torch.ones(3, dtype=torch.uint8), "y": torch.ones(2, dtype=torch.uint8)}, 2).staged(
            WAIT_SECONDS
        )
    assert bytes(daemon.last.content) == b"\1\1\1" + bytes(253) + b"\1\1" + bytes(254)


def test_publish_delivers_an_iterator_whose_tensors_are_reused(daemon: FakeDaemon) -> None:
    buffer = torch.empty(3000, dtype=torch.int32)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for at in range(40):
            yield f"t{at}", buffer.fill_(at)
        buffer.fill_(-1)

    with publisher(daemon) as pub:
        pub.publish(pairs(), 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == {f"t{at}": bytes_of(torch.full((3000,), at, dtype=torch.int32)) for at in range(40)}


@pytest.mark.parametrize("chunk_bytes", [256, 1000, 4096, 1 << 20])
def test_publish_keeps_to_the_chunk_size(make_daemon: MakeDaemon, chunk_bytes: int) -> None:
    daemon = make_daemon(chunk_bytes=chunk_bytes)
    tensors = some(3, 5000)
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(tensors)
    assert daemon.last.chunks == -(-daemon.last.opened.nbytes // chunk_bytes)


def test_publish_announces_a_large_manifest_in_parts(daemon: FakeDaemon) -> None:
    tensors = {f"t{at}": torch.tensor([at]) for at in range(1300)}
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    parts = [message for message in daemon.messages if isinstance(message, ManifestPart)]
    assert [len(part.shards) for part in parts] == [512, 512, 276]
    assert daemon.last.tensors() == content(tensors)


def test_publish_returns_when_tensors_may_change(daemon: FakeDaemon) -> None:
    tensors = some()
    expected = content(tensors)
    with publisher(daemon) as pub:
        handle = pub.publish(tensors, 1)
        for tensor in tensors.values():
            tensor.zero_()
        handle.staged(WAIT_SECONDS)
    assert daemon.last.tensors() == expected


def test_publish_overwrites_nothing_that_is_not_acknowledged(daemon: FakeDaemon) -> None:
    daemon.script.keep_chunks = True
    first, second = some(3), some(3, seed=5)
    with publisher(daemon) as pub:
        one = pub.publish(first, 1)
        two: list[Any] = []
        thread = threading.Thread(target=lambda: two.append(pub.publish(second, 2)))
        thread.start()
        daemon.wait_for_message(Seal)
        assert one.state == "receiving"
        daemon.give_back()
        thread.join(WAIT_SECONDS)
        two[0].staged(WAIT_SECONDS)
        one.staged(WAIT_SECONDS)
    assert [received.tensors() for received in daemon.received] == [content(first), content(second)]


def test_publish_announces_rank_and_force(daemon: FakeDaemon) -> None:
    with publisher(daemon, rank=2, world_size=4) as pub:
        pub.publish({}, 7, force=True).staged(WAIT_SECONDS)
    assert daemon.last.opened == OpenVersion(1, VersionId("m", "r", 7), 0, 0, True)
    hello = next(message for message in daemon.messages if isinstance(message, TrainerHello))
    assert (hello.model, hello.run, hello.rank, hello.world_size) == ("m", "r", 2, 4)


def test_publish_tells_progress(daemon: FakeDaemon) -> None:
    told: list[tuple[int, int]] = []
    with publisher(daemon) as pub:
        pub.publish(some(), 1, progress=lambda done, total: told.append((done, total))).live(WAIT_SECONDS)
    total = daemon.last.opened.nbytes
    assert told == sorted(told)
    assert told[-1] == (total, total)
    assert len(told) > 1


def test_publish_uses_the_socket_if_the_ring_cannot_be_had(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon._handoff_path.unlink()
    with publisher(daemon) as pub:
        pub.publish(some(), 1).staged(WAIT_SECONDS)
    assert daemon.last.inline_chunks == daemon.last.chunks > 0


@leaves_nothing
@pytest.mark.parametrize("broken", ["attach", "prefault"])
def test_ring_that_cannot_be_mapped_leaves_the_session_with_the_socket(
    make_daemon: MakeDaemon, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon hears of this process's end by the end of the connection that the ring came over."""

    def attach(fd: int, nbytes: int, *, writable: bool) -> None:
        os.close(fd)
        raise PeerError("cannot map")

    def prefault(ring: SharedMemory, offset: int, nbytes: int) -> None:
        raise ResourceError("no memory")

    monkeypatch.setattr(SharedMemory, broken, {"attach": attach, "prefault": prefault}[broken])
    daemon = make_daemon()
    with publisher(daemon) as pub:
        for version in (1, 2):
            pub.publish(some(seed=version), version).staged(WAIT_SECONDS)
        assert daemon.tethers_cut == 0
    assert sum(isinstance(message, TrainerHello) for message in daemon.messages) == 1
    assert daemon.last.inline_chunks == daemon.last.chunks > 0
    assert daemon.last.tensors() == content(some(seed=2))
    daemon.wait_for(lambda: daemon.tethers_cut == 1)


@pytest.mark.parametrize("daemon", ["inline"], indirect=True)
def test_bytes_leave_while_the_rest_is_staged(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    window = Staging.window

    def after_the_first_has_arrived(staging: Staging, offset: int, nbytes: int) -> Window:
        if offset == 4 * 4096:
            daemon.wait_for_message(Chunk)
        return window(staging, offset, nbytes)

    monkeypatch.setattr(Staging, "window", after_the_first_has_arrived)
    with publisher(daemon) as pub:
        pub.publish(some(), 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some())


@pytest.mark.parametrize("daemon", ["inline"], indirect=True)
def test_staging_stops_when_no_daemon_is_left(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    window = Staging.window
    failing = threading.Event()
    fail = Delivery.fail

    def noted(staging: Staging, offset: int, nbytes: int) -> Window:
        asked.append(offset)
        assert len(asked) == 1 or failing.wait(WAIT_SECONDS)
        return window(staging, offset, nbytes)

    def failed_and_noted(delivery: Delivery, error: CpeError) -> None:
        fail(delivery, error)
        failing.set()

    monkeypatch.setattr(Staging, "window", noted)
    monkeypatch.setattr(Delivery, "fail", failed_and_noted)
    daemon.script.refuse_open = ArenaFullError("no room")
    with publisher(daemon) as pub:
        handle = pub.publish(some(50), 1)
        with pytest.raises(ArenaFullError):
            handle.staged(WAIT_SECONDS)
    assert len(asked) <= 2


# --- what the handle tells -------------------------------------------------------------------------------------------


def test_live_reports_every_engine(daemon: FakeDaemon) -> None:
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 3)
        report = handle.live(WAIT_SECONDS)
        assert handle.state == "live"
        handle.staged(0)
    assert report.version == VersionId("m", "r", 3)
    assert report.nodes[daemon.endpoint].stage_seconds == report.stage_seconds == 0.5
    assert report.push_seconds == 0.25
    assert report.nbytes == daemon.last.opened.nbytes
    engine = report.engines["e0"]
    assert (engine.outcome, engine.phases["load"], engine.gigabytes_per_second) == ("updated", 0.2, 12.5)
    assert "e0" in str(report)
    assert "load 0.200 s" in str(report)


def test_handle_follows_the_daemon(daemon: FakeDaemon) -> None:
    daemon.script.after_seal = ()
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        daemon.wait_for_message(Seal)
        with pytest.raises(DeadlineError, match=r"m@r#1 is not staged after 0.01 s: receiving at ipc"):
            handle.staged(0.01)
        daemon.say(VersionStatus(handle.version, "staged"))
        handle.staged(WAIT_SECONDS)
        with pytest.raises(DeadlineError, match="not live"):
            handle.live(0.01)
        daemon.say(VersionStatus(handle.version, "live"))
        assert handle.live(WAIT_SECONDS).engines == {}


def test_rank_whose_part_is_there_is_told_who_knows_whose_is_not(daemon: FakeDaemon) -> None:
    daemon.script.after_seal = ()
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle._wait(lambda delivery: delivery.delivered, "delivered", WAIT_SECONDS)
        with pytest.raises(DeadlineError, match=r"which has all of this rank's part \(`wait_live` and `cpe wait` name"):
            handle.staged(0.01)
        daemon.say(VersionStatus(handle.version, "staged"))
        handle.staged(WAIT_SECONDS)
        with pytest.raises(DeadlineError, match=r"staged at ipc\S*$"):
            handle.live(0.01)


def test_staged_holds_though_the_push_failed(daemon: FakeDaemon) -> None:
    daemon.script.after_seal = ("staged", "pushing")
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        daemon.say(failed(handle.version, CpeError("no engine took it")))
        with pytest.raises(CpeError, match=r"no engine took it \(m@r#1 at ipc"):
            handle.live(WAIT_SECONDS)
        handle.staged(WAIT_SECONDS)
        assert handle.state == "failed"


# --- what goes wrong with a version ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [VersionRefusedError("9 or higher"), ArenaFullError("no room"), BusyError("later"), ManifestError("no")]
)
def test_refused_version_raises_the_daemons_error(daemon: FakeDaemon, error: CpeError) -> None:
    daemon.script.refuse_open = error
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 8)
        with pytest.raises(type(error), match=error.message):
            handle.staged(WAIT_SECONDS)
        daemon.script.refuse_open = None
        pub.publish(some(), 9).staged(WAIT_SECONDS)


def test_failure_before_the_daemon_made_room_is_heard(daemon: FakeDaemon) -> None:
    daemon.script.ignore_open = True
    handles: list[Any] = []
    with publisher(daemon) as pub:
        thread = threading.Thread(target=lambda: handles.append(pub.publish(some(), 1)))
        thread.start()
        daemon.wait_for_message(ManifestPart)
        daemon.say(failed(VersionId("m", "r", 1), ArenaFullError("no room")))
        thread.join(WAIT_SECONDS)
        with pytest.raises(ArenaFullError):
            handles[0].staged(WAIT_SECONDS)


@leaves_nothing
def test_damaged_bytes_raise_digest_error(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with publisher(daemon) as pub:
        damaged = lambda stream, digests, fold: Seal(stream, bytes(len(digests)))  # noqa: E731
        monkeypatch.setattr("cpe_daemon.publisher.sending.Seal", damaged)
        handle = pub.publish(some(), 1)
        with pytest.raises(DigestError, match="m@r#1"):
            handle.live(WAIT_SECONDS)
        monkeypatch.undo()
        pub.publish(some(), 1).live(WAIT_SECONDS)  # the news of the first attempt's failure does not hit the second


def test_failure_between_chunks_ends_a_publish(daemon: FakeDaemon) -> None:
    daemon.script.refuse_chunk = ArenaFullError("no room")
    with publisher(daemon) as pub:
        handle = pub.publish(some(50), 1)
        with pytest.raises(ArenaFullError):
            handle.staged(WAIT_SECONDS)
        daemon.script.refuse_chunk = None
        pub.publish(some(50), 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some(50))


@leaves_nothing
def test_protocol_error_raises_it_and_greets_again(daemon: FakeDaemon) -> None:
    daemon.script.ignore_open = True
    handles: list[Any] = []
    with publisher(daemon) as pub:
        thread = threading.Thread(target=lambda: handles.append(pub.publish(some(), 1)))
        thread.start()
        daemon.wait_for_message(ManifestPart)
        daemon.say(ErrorReply(ErrorInfo("protocol", "what?"), stream=1))
        thread.join(WAIT_SECONDS)
        with pytest.raises(ProtocolError, match=r"what\?"):
            handles[0].staged(WAIT_SECONDS)
        daemon.script.ignore_open = False
        pub.publish(some(), 1).staged(WAIT_SECONDS)
    daemon.wait_for_message(TrainerHello, 2)


def test_stalled_daemon_passes_the_deadline(daemon: FakeDaemon) -> None:
    daemon.script.keep_chunks = True
    with publisher(daemon, send_timeout=2.0) as pub:
        handle = pub.publish(some(), 1)
        with pytest.raises(DeadlineError, match="acknowledged no bytes of m@r#1"):
            handle.staged(WAIT_SECONDS)
        daemon.wait_for_message(Abandon)
        daemon.give_back()
        pub.publish(some(), 2).staged(WAIT_SECONDS)


def test_daemon_without_room_passes_the_deadline(daemon: FakeDaemon) -> None:
    daemon.script.ignore_open = True
    with publisher(daemon, send_timeout=0.3) as pub, pytest.raises(DeadlineError, match="made no room for m@r#1"):
        pub.publish(some(), 1).staged(WAIT_SECONDS)


def test_publish_goes_on_when_the_one_before_it_stalls(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(credits=64)
    daemon.script.keep_chunks = True
    with publisher(daemon, send_timeout=0.3) as pub:
        first = pub.publish(some(), 1)
        started = time.monotonic()
        pub.publish(some(), 2)
        assert time.monotonic() - started < 5
        with pytest.raises(DeadlineError):
            first.staged(WAIT_SECONDS)


@pytest.mark.parametrize("daemon", ["landing"], indirect=True)
def test_source_that_raises_gives_the_version_up(daemon: FakeDaemon) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with publisher(daemon) as pub:
        with pytest.raises(KeyboardInterrupt):
            pub.publish(some(), 1, progress=stop)
        daemon.wait_for_message(Abandon)
        pub.publish(some(), 1).staged(WAIT_SECONDS)


@pytest.mark.parametrize("daemon", ["inline"], indirect=True)
def test_source_that_raises_while_it_is_staged_gives_the_version_up(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = Staging.window

    def stop(staging: Staging, offset: int, nbytes: int) -> Window:
        if offset:
            daemon.wait_for_message(OpenVersion)
            raise OSError("the checkpoint's file cannot be read")
        return window(staging, offset, nbytes)

    monkeypatch.setattr(Staging, "window", stop)
    with publisher(daemon) as pub:
        with pytest.raises(OSError, match="cannot be read"):
            pub.publish(some(), 1)
        daemon.wait_for_message(Abandon)
        monkeypatch.undo()
        pub.publish(some(), 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some())


@pytest.mark.parametrize("daemon", ["inline"], indirect=True)
def test_progress_that_raises_in_the_background_gives_the_version_up(daemon: FakeDaemon) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with publisher(daemon) as pub:
        daemon.script.keep_chunks = True
        handle = pub.publish(some(), 1, progress=stop)
        with pytest.raises(PublishError, match="enough"):
            handle.staged(WAIT_SECONDS)
        daemon.wait_for_message(Abandon)
        daemon.give_back()
        pub.publish(some(), 1).staged(WAIT_SECONDS)


def test_bad_source_is_refused_before_anything_is_announced(daemon: FakeDaemon) -> None:
    with publisher(daemon) as pub:
        for source in ({"a": 1}, {}, [("a", torch.ones(1)), ("a", torch.ones(1))], iter([("a", None)])):
            with pytest.raises(ManifestError):
                pub.publish(source, 1)  # type: ignore[arg-type]
        pub.publish(some(), 1).staged(WAIT_SECONDS)
    assert len(daemon.received) == 1


# --- what goes wrong with a daemon -----------------------------------------------------------------------------------


@leaves_nothing
def test_refused_hello_is_raised_by_the_publish(daemon: FakeDaemon) -> None:
    daemon.script.refuse_hello = VersionRefusedError("this run is over")
    with publisher(daemon) as pub:
        with pytest.raises(VersionRefusedError, match="this run is over"):
            pub.publish(some(), 1)
        daemon.script.refuse_hello = None
        pub.publish(some(), 1).staged(WAIT_SECONDS)


def test_publish_waits_for_a_daemon_that_starts_later(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.stop()
    with publisher(daemon) as pub:
        daemon.start()
        pub.publish(some(), 1).staged(WAIT_SECONDS)


def test_absent_daemon_is_lost_after_the_connect_timeout(runtime_dir: Path) -> None:
    nobody = FakeDaemon(runtime_dir)
    with publisher(nobody, connect_timeout=0.2) as pub, pytest.raises(PeerLostError, match="no daemon answered at ipc"):
        pub.publish(some(), 1)


@leaves_nothing
def test_daemon_that_ends_fails_the_publish_at_once(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(heartbeat_seconds=60.0)
    daemon.script.keep_chunks = True
    handles: list[Any] = []
    with publisher(daemon) as pub:
        thread = threading.Thread(target=lambda: handles.append(pub.publish(some(), 1)))
        thread.start()
        daemon.wait_for_message(Chunk, daemon.credits)
        daemon.stop()
        thread.join(WAIT_SECONDS)
        with pytest.raises(PeerLostError, match=r"ended \(m@r#1 was receiving\)"):
            handles[0].staged(WAIT_SECONDS)


def test_silent_daemon_fails_the_publish(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(landing=False, heartbeat_seconds=0.5)
    with publisher(daemon) as pub:
        daemon.script.after_seal = ("staged",)
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        daemon.script.mute = True
        with pytest.raises(PeerLostError, match="silent"):
            handle.live(WAIT_SECONDS)
        handle.staged(0)


@leaves_nothing
def test_restarted_daemon_fails_what_was_in_flight_and_takes_the_next(daemon: FakeDaemon) -> None:
    daemon.script.after_seal = ("staged",)
    daemon.heartbeat_seconds = 0.5
    daemon.stop()
    daemon.start()
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        daemon.stop()
        daemon.start()
        with pytest.raises(PeerLostError):
            handle.live(WAIT_SECONDS)
        pub.publish(some(), 2).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some())


def test_pong_of_another_generation_means_a_restart(daemon: FakeDaemon) -> None:
    daemon.script.after_seal = ("staged",)
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        daemon.say(Pong("another"))
        with pytest.raises(PeerLostError, match="restarted"):
            handle.live(WAIT_SECONDS)
        pub.publish(some(), 2).staged(WAIT_SECONDS)


def test_farewell_fails_what_is_pending_at_once_and_is_no_reason_to_worry(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    daemon.script.after_seal = ("staged",)
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        daemon.script.farewell = "it is upgraded"
        daemon.say(Farewell("it is upgraded"))
        with pytest.raises(PeerLostError, match=r"said farewell: it is upgraded \(m@r#1 was staged\)"):
            handle.live(WAIT_SECONDS)
        daemon.wait_for_message(TrainerBye)
        daemon.wait_for_message(TrainerHello, 3)  # it comes back, again and again, and is turned away
        daemon.stop()
        daemon.script.farewell = ""
        daemon.start()
        pub.publish(some(), 2).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some())
    said = [record for record in caplog.records if record.name.startswith("cpe_daemon")]
    late = f"the daemon at {daemon.endpoint} did not answer a hello"  # that was on its way when it stopped
    told = [record.message for record in said if not record.message.startswith(late)]
    assert told == [f"the daemon at {daemon.endpoint} said farewell: it is upgraded"]


# --- several daemons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, False)])
def test_every_daemon_gets_every_byte(make_daemon: MakeDaemon, kinds: tuple[bool, bool]) -> None:
    daemons = [make_daemon(f"d{at}", landing=landing) for at, landing in enumerate(kinds)]
    tensors = zoo()
    with publisher(*daemons) as pub:
        report = pub.publish(tensors, 1).live(WAIT_SECONDS)
    for daemon, landing in zip(daemons, kinds, strict=True):
        assert daemon.last.tensors() == content(tensors)
        assert (daemon.last.inline_chunks == 0) == landing
    assert set(report.nodes) == {daemon.endpoint for daemon in daemons}
    assert set(report.engines) == {f"e0@{daemon.endpoint}" for daemon in daemons}


def test_daemons_may_differ_in_chunk_size(make_daemon: MakeDaemon) -> None:
    daemons = [make_daemon("a", chunk_bytes=1024), make_daemon("b", chunk_bytes=4096), make_daemon("c", landing=False)]
    with publisher(*daemons) as pub:
        pub.publish(some(), 1).live(WAIT_SECONDS)
    assert [daemon.last.tensors() for daemon in daemons] == [content(some())] * 3


@pytest.mark.parametrize("landing", [True, False])
def test_one_failure_does_not_stop_the_others(make_daemon: MakeDaemon, landing: bool) -> None:
    good, bad = make_daemon("good", landing=landing), make_daemon("bad", landing=landing)
    bad.script.refuse_chunk = ArenaFullError("no room")
    with publisher(bad, good) as pub:
        handle = pub.publish(some(50), 1)
        with pytest.raises(EndpointsFailedError, match=r"failed at 1 of 2 daemons: ipc:.*bad.*no room") as raised:
            handle.staged(WAIT_SECONDS)
        assert isinstance(raised.value.failures[bad.endpoint], ArenaFullError)
        assert handle.state == "failed"
    assert good.last.tensors() == content(some(50))
    assert good.last.sealed


def test_absent_daemon_does_not_stop_the_others(make_daemon: MakeDaemon, runtime_dir: Path) -> None:
    good, absent = make_daemon("good"), FakeDaemon(runtime_dir, "absent")
    with publisher(good, absent, connect_timeout=0.2) as pub:
        pub._links[0].ready("the first version", WAIT_SECONDS)
        for version in (1, 2):
            with pytest.raises(EndpointsFailedError, match=r"1 of 2 daemons: .*absent\.sock: no daemon answered"):
                pub.publish(some(), version).live(WAIT_SECONDS)
            assert good.last.opened.version.number == version
            assert good.last.tensors() == content(some())


@leaves_nothing
def test_daemon_that_ends_midway_does_not_stop_the_others(make_daemon: MakeDaemon) -> None:
    good, bad = make_daemon("good"), make_daemon("bad")
    bad.script.keep_chunks = True
    handles: list[Any] = []
    with publisher(bad, good) as pub:
        thread = threading.Thread(target=lambda: handles.append(pub.publish(some(50), 1)))
        thread.start()
        bad.wait_for_message(Chunk, bad.credits)
        bad.stop()
        thread.join(WAIT_SECONDS)
        with pytest.raises(PublishError, match=r"bad"):
            handles[0].staged(WAIT_SECONDS)
    assert good.last.tensors() == content(some(50))


# --- what is held already --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consumed", [False, True])
def test_version_that_is_held_is_not_sent(daemon: FakeDaemon, consumed: bool) -> None:
    tensors, told = some(), []
    daemon.script.held = "live"
    with publisher(daemon) as pub:
        source = iter(tensors.items()) if consumed else tensors
        handle = pub.publish(source, 1, progress=lambda done, total: told.append((done, total)))
        report = handle.live(WAIT_SECONDS)
        handle.staged(0)
        assert (handle.state, handle.held, report.held) == ("live", [daemon.endpoint], (daemon.endpoint,))
        assert "(held there already: nothing was sent)" in str(report)
        assert report.engines["e0"].outcome == "updated"
        daemon.script.held = ""
        assert pub.publish(tensors, 2).live(WAIT_SECONDS).held == ()
    first, second = daemon.received
    assert (first.chunks, first.sealed, second.sealed) == (0, True, True)
    assert first.digests == second.digests
    done, total = told[-1]
    assert done == total == first.opened.nbytes


def test_version_that_is_held_goes_on_from_where_it_is(daemon: FakeDaemon) -> None:
    daemon.script.held = "staged"
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        assert handle.state == "staged"
        daemon.say(VersionStatus(handle.version, "pushing"))
        daemon.say(VersionStatus(handle.version, "live"))
        handle.live(WAIT_SECONDS)


def test_version_that_was_replaced_is_held_and_not_live(daemon: FakeDaemon) -> None:
    daemon.script.held = "retained"
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.staged(WAIT_SECONDS)
        assert (handle.state, handle.held) == ("retained", [daemon.endpoint])
        with pytest.raises(
            PublishError, match=r"m@r#1 is retained at .* another version took its place; `cpe rollback"
        ):
            handle.live(WAIT_SECONDS)
        daemon.script.held = ""
        pub.publish(some(), 2).live(WAIT_SECONDS)


def test_version_that_is_held_as_another_is_refused(daemon: FakeDaemon) -> None:
    daemon.script.held = "live"
    daemon.script.refuse_seal = VersionRefusedError("is held here (live) with other weights")
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        with pytest.raises(VersionRefusedError, match="with other weights"):
            handle.staged(WAIT_SECONDS)
        assert (handle.state, handle.held) == ("failed", [])
        daemon.script.held = ""
        pub.publish(some(), 2).live(WAIT_SECONDS)


def test_news_of_the_version_that_is_held_are_not_believed_before_it_is_the_same(daemon: FakeDaemon) -> None:
    """The first attempt hears them meanwhile."""
    daemon.script.after_seal = ["staged"]
    with publisher(daemon) as pub:
        first = pub.publish(some(), 1)
        first.staged(WAIT_SECONDS)
        daemon.script.held = "live"
        daemon.script.refuse_seal = VersionRefusedError("with other weights")
        daemon.script.before_refusal = [VersionStatus(first.version, "live")]
        second = pub.publish(some(seed=7), 1)
        with pytest.raises(VersionRefusedError, match="with other weights"):
            second.live(WAIT_SECONDS)
        first.live(WAIT_SECONDS)


@pytest.mark.parametrize("landing", [True, False])
def test_only_daemons_that_lack_a_version_are_sent_it(make_daemon: MakeDaemon, landing: bool) -> None:
    holds, lacks = make_daemon("a", landing=landing), make_daemon("b", landing=landing)
    holds.script.held = "live"
    tensors = some()
    with publisher(holds, lacks) as pub:
        handle = pub.publish(tensors, 1)
        report = handle.live(WAIT_SECONDS)
    assert handle.held == list(report.held) == [holds.endpoint]
    assert (holds.last.chunks, lacks.last.tensors()) == (0, content(tensors))
    assert holds.last.digests == lacks.last.digests


@pytest.mark.parametrize("landing", [True, False])
def test_daemon_that_holds_a_version_is_sealed_though_all_that_lack_it_fail(
    make_daemon: MakeDaemon, landing: bool
) -> None:
    holds, lacks = make_daemon("a", landing=landing), make_daemon("b", landing=landing)
    holds.script.held = "live"
    lacks.script.refuse_chunk = ResourceError("no room")
    with publisher(holds, lacks) as pub:
        handle = pub.publish(some(), 1)
        with pytest.raises(EndpointsFailedError) as caught:
            handle.live(WAIT_SECONDS)
    assert list(caught.value.failures) == [lacks.endpoint]
    assert handle.held == [holds.endpoint]
    assert holds.last.sealed


def test_comparison_that_gets_no_answer_is_given_up(daemon: FakeDaemon) -> None:
    daemon.script.held = "live"
    daemon.script.ignore_seal = True
    with publisher(daemon, send_timeout=2.0) as pub:
        with pytest.raises(DeadlineError, match=r"did not compare m@r#1 for 2 s"):
            pub.publish(some(), 1).live(WAIT_SECONDS)
        daemon.wait_for_message(Abandon)
        daemon.script.held, daemon.script.ignore_seal = "", False
        pub.publish(some(), 2).live(WAIT_SECONDS)


# --- the end ---------------------------------------------------------------------------------------------------------


def test_close_abandons_what_is_in_flight(daemon: FakeDaemon) -> None:
    daemon.script.keep_chunks = True
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            pub.publish(some(), 1).staged(WAIT_SECONDS)
        except CpeError as error:
            errors.append(error)

    pub = publisher(daemon)
    thread = threading.Thread(target=publish)
    thread.start()
    daemon.wait_for_message(Chunk, daemon.credits)
    started = time.monotonic()
    pub.close()
    assert time.monotonic() - started < 6
    thread.join(WAIT_SECONDS)
    assert isinstance(errors[0], PublishError)
    daemon.wait_for_message(Abandon)


def test_close_returns_though_nobody_answers(runtime_dir: Path) -> None:
    started = time.monotonic()
    publisher(FakeDaemon(runtime_dir)).close()
    assert time.monotonic() - started < 3


def test_clean_exit_delivers_what_was_published(daemon: FakeDaemon) -> None:
    with publisher(daemon) as pub:
        pub.publish(some(), 1)
    assert daemon.last.sealed
    assert not any(isinstance(message, Abandon) for message in daemon.messages)


def test_closed_publisher_publishes_no_more(daemon: FakeDaemon) -> None:
    pub = publisher(daemon)
    pub.close()
    pub.close()
    with pytest.raises(MisuseError, match="closed"):
        pub.publish(some(), 1)


@pytest.mark.parametrize(
    ("endpoints", "options"),
    [([], {}), (["ipc:///tmp/x", "ipc:///tmp/x"], {}), ("ipc:///tmp/x", {"rank": 1}), ("ipc:///tmp/x", {"model": ""})],
)
def test_senseless_arguments_are_refused(endpoints: Any, options: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        Publisher(endpoints, **{"model": "m", "run": "r", **options})


@pytest.mark.parametrize("version", [-1, 3.0, True, "3", None])
def test_version_that_is_no_whole_number_is_refused(daemon: FakeDaemon, version: Any) -> None:
    with Publisher(daemon.endpoint, model="m", run="r") as publisher:
        with pytest.raises(MisuseError, match="whole number"):
            publisher.publish({"w": torch.ones(1)}, version=version)
        counted: Any = torch.tensor(4)
        assert publisher.publish({"w": torch.ones(1)}, version=counted).version.number == 4


def test_runtime_directory_is_an_endpoint(daemon: FakeDaemon) -> None:
    path = Path(daemon.endpoint.removeprefix("ipc://"))
    with Publisher(str(path), model="m", run="r") as publisher:
        publisher.publish({"w": torch.ones(1)}, version=1).staged(timeout=10)


@leaves_nothing
def test_malformed_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        Publisher(["ipc:///tmp/x", "nonsense"], model="m", run="r")

"""The conversation about versions, without sockets: what is said when, and what is believed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import ArenaFullError, CpeError, DeadlineError, PeerLostError, PublishError, VersionRefusedError
from cpe_daemon.publisher.credits import Credits
from cpe_daemon.publisher.delivery import Bell, Delivery
from cpe_daemon.publisher.handle import Handle
from cpe_daemon.publisher.in_place import InPlace
from cpe_daemon.publisher.report import PublishReport
from cpe_daemon.publisher.sending import Sending
from cpe_daemon.publisher.straight import Straight
from cpe_daemon.publisher.under_way import Stream
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    TrainerWelcome,
    VersionOpened,
    VersionStatus,
)
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport, size_text

VERSION = VersionId("m", "r", 1)
SHARDS = [Shard("a", "uint8", (600,))]
CONTENT = memoryview(bytearray(range(256)) * 3)
FAILED = VersionStatus(VERSION, "failed", ErrorInfo("arena_full", "no room"))


class Desk:
    """A `Sending` with its messages and its clock in hand."""

    def __init__(self, ring: SharedMemory | None = None, credits: int = 2) -> None:
        self.said: list[Message] = []
        self.frames: list[bytes] = []
        self.now = 100.0
        self.bell = Bell()
        welcome = TrainerWelcome(1, "g", 1.0, credits, 256)
        self.sending = Sending(self._send, welcome, ring, self.bell, send_timeout=60.0, clock=lambda: self.now)

    def _send(self, message: Message, *frames: bytes | memoryview | zmq.Frame) -> None:
        self.said.append(message)
        self.frames += [bytes(memoryview(frame.buffer if isinstance(frame, zmq.Frame) else frame)) for frame in frames]

    def begin(self, version: VersionId = VERSION) -> Stream:
        stream = self.sending.begin(Delivery("here", version, 768, 1, self.bell))
        self.sending.open(stream, SHARDS, False)
        return stream

    def opened(self, *, held: bool = False) -> Stream:
        stream = self.begin()
        self.sending.take(VersionOpened(stream.number, held=held))
        self.sending.feed(stream, CONTENT, len(CONTENT))
        self.sending.pump()
        return stream

    def delivered(self, stream: Stream) -> bool:
        return stream.delivery.delivered

    def error(self, stream: Stream) -> CpeError | None:
        return stream.delivery.error

    def kinds(self) -> list[type[Message]]:
        return [type(message) for message in self.said]

    def handle(self, stream: Stream) -> Handle:
        return Handle(stream.delivery.version, [stream.delivery], self.bell)


def test_stream_opens_sends_seals_and_is_delivered() -> None:
    desk = Desk()
    stream = desk.begin()
    desk.sending.feed(stream, CONTENT, len(CONTENT))
    desk.sending.pump()
    assert desk.kinds() == [OpenVersion, ManifestPart]
    desk.sending.take(VersionOpened(stream.number))
    desk.sending.pump()
    desk.sending.seal(stream, b"d" * 16)
    assert desk.said[2:] == [Chunk(1, 0, 256), Chunk(1, 256, 256)]
    desk.sending.take(ChunkDone(1))
    desk.sending.pump()
    assert desk.said[4:] == [Chunk(1, 512, 256), Seal(1, b"d" * 16)]
    assert not desk.delivered(stream)
    desk.sending.take(ChunkDone(1))
    desk.sending.take(ChunkDone(1))
    assert desk.delivered(stream)
    assert b"".join(desk.frames) == bytes(CONTENT)


def test_contribution_without_bytes_is_sealed_when_it_is_opened() -> None:
    desk = Desk()
    stream = desk.sending.begin(Delivery("here", VERSION, 0, 0, desk.bell))
    desk.sending.open(stream, [], False)
    desk.sending.seal(stream, b"")
    assert desk.kinds() == [OpenVersion]
    desk.sending.take(VersionOpened(stream.number))
    assert desk.kinds() == [OpenVersion, Seal]
    assert desk.delivered(stream)


def test_acknowledgement_of_nothing_is_ignored() -> None:
    desk = Desk()
    stream = desk.opened()
    for done in (ChunkDone(9), ChunkDone(1, 0), ChunkDone(1, 1 << 40)):
        desk.sending.take(done)
    assert stream.unacked == 2
    desk.sending.pump()
    assert desk.kinds().count(Chunk) == 2


def test_credits_of_a_failed_stream_come_back_with_their_chunks() -> None:
    desk = Desk()
    stream = desk.opened()
    desk.sending.take(ErrorReply(ErrorInfo("arena_full", "no room"), stream.number))
    desk.sending.take(FAILED)
    again = desk.opened()
    assert desk.kinds().count(Chunk) == 2
    desk.sending.take(ChunkDone(stream.number))
    desk.sending.pump()
    assert desk.said[-1] == Chunk(again.number, 0, 256)
    with pytest.raises(ArenaFullError, match=r"no room \(m@r#1 at here\)"):
        desk.handle(stream).staged(0)


def test_late_news_of_an_earlier_attempt_is_not_taken_for_the_next() -> None:
    desk = Desk()
    stream = desk.opened()
    desk.sending.abandon(stream, PublishError("changed my mind"))
    assert desk.said[-1] == Abandon(stream.number, "changed my mind")
    again = desk.begin()
    desk.sending.take(FAILED)
    assert desk.error(again) is None
    desk.sending.take(VersionOpened(again.number))
    desk.sending.take(FAILED)
    assert isinstance(desk.error(again), ArenaFullError)


def test_failure_of_a_version_that_is_not_opened_yet_is_believed() -> None:
    desk = Desk()
    stream = desk.begin()
    desk.sending.take(FAILED)
    assert isinstance(stream.delivery.error, ArenaFullError)


def lying(*offsets: int) -> Straight:
    """Chunks that lie elsewhere than the copy, and hold other bytes."""
    straight = Straight()
    for offset in offsets:
        straight.put(offset, InPlace([memoryview(bytearray(b"x" * 200)), memoryview(bytearray(b"y" * 56))]))
    return straight


def test_chunk_is_sent_from_where_it_lies() -> None:
    desk = Desk(credits=3)
    stream = desk.begin()
    desk.sending.take(VersionOpened(stream.number))
    desk.sending.feed(stream, CONTENT, len(CONTENT), lying(256))
    desk.sending.pump()
    assert desk.said[2:] == [Chunk(1, 0, 256), Chunk(1, 256, 256), Chunk(1, 512, 256)]
    assert desk.frames == [bytes(CONTENT[:256]), b"x" * 200, b"y" * 56, bytes(CONTENT[512:])]


def test_few_chunks_are_sent_from_where_they_lie_before_any_is_acknowledged() -> None:
    desk = Desk(credits=8)
    stream = desk.begin()
    content, straight = memoryview(bytearray(256 * 12)), lying(*range(0, 256 * 12, 256))
    stream.delivery.nbytes = len(content)
    desk.sending.take(VersionOpened(stream.number))
    desk.sending.feed(stream, content, len(content), straight)
    for expected in (2, 4, 6, 8, 10):
        desk.sending.pump()
        assert desk.kinds().count(Chunk) == expected
        desk.sending.take(ChunkDone(1))
    straight.take_back(256 * 10)  # a copy does not wait for acknowledgements
    for _ in range(3):
        desk.sending.pump()
    assert desk.kinds().count(Chunk) == 12


def test_chunk_whose_tensors_are_gone_is_not_sent_and_costs_no_credit() -> None:
    desk = Desk()
    stream, straight = desk.begin(), lying(0)
    straight.close()
    desk.sending.take(VersionOpened(stream.number))
    desk.sending.feed(stream, CONTENT, len(CONTENT), straight)
    desk.sending.pump()
    desk.sending.pump()
    assert Chunk not in desk.kinds()
    desk.sending.abandon(stream, PublishError("enough"))
    desk.opened()
    assert desk.kinds().count(Chunk) == 2


def delivered(desk: Desk) -> Stream:
    """A stream whose version is whole at the daemon."""
    stream = desk.opened()
    desk.sending.seal(stream, bytes(16))
    for _ in range(3):
        desk.sending.take(ChunkDone(stream.number))
        desk.sending.pump()
    assert stream.delivery.delivered
    return stream


def compared(desk: Desk, state: str, error: ErrorInfo | None = None) -> Stream:
    """A stream of a version that is held, after the daemon's answer to its seal."""
    chunks = desk.kinds().count(Chunk)
    stream = desk.opened(held=True)
    desk.sending.seal(stream, bytes(16))
    assert desk.said[-1] == Seal(stream.number, bytes(16))
    assert desk.kinds().count(Chunk) == chunks
    desk.sending.take(VersionStatus(VERSION, state, error, stream=stream.number))
    return stream


@pytest.mark.parametrize(
    ("state", "live", "over"),
    [
        ("staged", False, False),
        ("pushing", False, False),
        ("live", True, True),
        ("retained", False, True),
        ("evicted", False, True),
    ],
)
def test_version_that_is_held_is_delivered_when_its_digests_are_equal(state: str, live: bool, over: bool) -> None:
    stream = compared(Desk(), state)
    delivery = stream.delivery
    assert (delivery.state, delivery.held, delivery.comparing) == (state, True, False)
    assert (delivery.delivered, delivery.staged, delivery.live, delivery.over) == (True, True, live, over)
    assert isinstance(delivery.error, PublishError) is (over and not live)


@pytest.mark.parametrize("state", ["failed", "evicted"])
def test_version_that_is_held_may_have_failed_meanwhile(state: str) -> None:
    stream = compared(Desk(), state, ErrorInfo("engine", "no engine took it"))
    assert (stream.delivery.state, stream.delivery.live) == ("failed", False)
    assert "no engine took it" in str(stream.delivery.error)


def test_seal_of_what_is_held_waits_until_the_daemon_has_said_so() -> None:
    desk = Desk()
    stream = desk.begin()
    desk.sending.seal(stream, bytes(16))
    assert Seal not in desk.kinds()
    desk.sending.take(VersionOpened(stream.number, held=True))
    assert desk.kinds()[-1] is Seal


@pytest.mark.parametrize("state", ["staged", "live", "retained", "failed"])
def test_news_of_an_attempt_before_do_not_concern_one_that_is_compared(state: str) -> None:
    desk = Desk()
    first = delivered(desk)
    again = desk.begin()
    news = VersionStatus(VERSION, state, ErrorInfo("engine", "no engine took it") if state == "failed" else None)
    for message in (news, VersionOpened(again.number, held=True), news):
        desk.sending.take(message)
        assert (again.delivery.staged, again.delivery.live, again.delivery.error) == (False, False, None)
    assert (first.delivery.state, first.delivery.delivered) == (state, True)
    desk.sending.seal(again, bytes(16))
    desk.sending.take(VersionStatus(VERSION, "live", stream=again.number))
    assert again.delivery.live


def test_failure_concerns_the_attempt_that_is_received_and_the_next_only_after_that() -> None:
    """A push fails while the trainer has published the version again already: the daemon receives it anew."""
    desk = Desk()
    first = delivered(desk)
    again = desk.begin()
    desk.sending.take(FAILED)
    assert (desk.error(first) is None, desk.error(again)) == (False, None)
    desk.sending.take(VersionOpened(again.number))
    desk.sending.take(FAILED)
    assert isinstance(desk.error(again), ArenaFullError)


def test_both_attempts_hear_what_becomes_of_a_version() -> None:
    desk = Desk()
    first = delivered(desk)
    desk.sending.take(VersionStatus(VERSION, "staged"))
    again = compared(desk, "staged")
    desk.sending.take(VersionStatus(VERSION, "live"))
    assert first.delivery.live
    assert again.delivery.live


def test_version_that_is_held_as_another_is_refused_and_the_next_attempt_is_heard() -> None:
    desk = Desk()
    stream = desk.opened(held=True)
    desk.sending.seal(stream, bytes(16))
    desk.sending.take(ErrorReply(ErrorInfo("version_refused", "with other weights"), stream.number))
    assert isinstance(desk.error(stream), VersionRefusedError)
    again = desk.begin()
    desk.sending.take(FAILED)  # the daemon said nothing of the attempt before: it changed nothing there
    assert isinstance(desk.error(again), ArenaFullError)


def test_comparison_may_be_given_up() -> None:
    desk = Desk()
    stream = desk.opened(held=True)
    desk.sending.abandon(stream, PublishError("changed my mind"))
    assert desk.said[-1] == Abandon(stream.number, "changed my mind")
    again = desk.begin()
    desk.sending.take(FAILED)
    assert isinstance(desk.error(again), ArenaFullError)


@pytest.mark.parametrize("sealed", [False, True])
def test_comparison_is_given_up_only_if_the_daemon_owes_the_answer(sealed: bool) -> None:
    desk = Desk()
    stream = desk.opened(held=True)
    desk.now += 1000.0  # the trainer makes digests
    if sealed:
        desk.sending.seal(stream, bytes(16))
    desk.sending.give_up_stalled()
    desk.now += 60.0
    desk.sending.give_up_stalled()
    assert desk.error(stream) is None
    desk.now += 1.0
    desk.sending.give_up_stalled()
    assert isinstance(desk.error(stream), DeadlineError) is sealed


@pytest.mark.parametrize("opened", [False, True])
def test_stream_is_given_up_when_the_daemon_owes_an_answer_too_long(opened: bool) -> None:
    desk = Desk()
    stream = desk.opened() if opened else desk.begin()
    desk.now += 60.0
    desk.sending.give_up_stalled()
    assert desk.error(stream) is None
    desk.now += 1.0
    desk.sending.give_up_stalled()
    assert isinstance(desk.error(stream), DeadlineError)
    assert desk.kinds()[-1] is Abandon


def test_stream_is_not_given_up_while_the_trainer_is_slow() -> None:
    desk = Desk()
    stream = desk.begin()
    desk.sending.take(VersionOpened(stream.number))
    desk.now += 1000.0
    desk.sending.give_up_stalled()
    desk.sending.feed(stream, CONTENT, len(CONTENT))
    desk.sending.pump()
    desk.now += 59.0
    desk.sending.give_up_stalled()
    assert stream.delivery.error is None


def test_end_fails_whatever_is_expected_even_if_it_was_not_sent_yet() -> None:
    desk = Desk()
    waiting = desk.sending.begin(Delivery("here", VersionId("m", "r", 3), 0, 0, desk.bell))
    staged = desk.begin(VersionId("m", "r", 2))
    staged.delivery.take(VersionStatus(staged.delivery.version, "staged"))
    desk.sending.end(PeerLostError("gone"))
    late = desk.sending.begin(Delivery("here", VERSION, 0, 0, desk.bell))
    for stream in (waiting, staged, late):
        assert isinstance(stream.delivery.error, PeerLostError)
    assert staged.delivery.staged
    assert desk.sending.credit(late) is None
    said = len(desk.said)
    desk.sending.open(late, SHARDS, False)
    assert len(desk.said) == said


@pytest.fixture
def ring() -> Iterator[SharedMemory]:
    memory = SharedMemory.create("ring", 512)
    yield memory
    memory.close()


def test_staged_bytes_go_into_the_ring(ring: SharedMemory) -> None:
    desk = Desk(ring)
    desk.opened()
    assert desk.said[2:] == [Chunk(1, 0, 256, 0), Chunk(1, 256, 256, 256)]
    assert bytes(ring.view) == bytes(CONTENT[:512])
    desk.sending.take(ChunkDone(1, 256))
    desk.sending.pump()
    assert desk.said[-1] == Chunk(1, 512, 256, 256)


def test_staged_bytes_are_sent_as_they_come_in_whole_chunks() -> None:
    desk = Desk(credits=8)
    stream = desk.begin()
    desk.sending.take(VersionOpened(stream.number))
    offsets: list[list[int]] = []
    for upto in (0, 255, 256, 700, 768):
        desk.sending.feed(stream, CONTENT, upto)
        desk.sending.pump()
        offsets.append([message.offset for message in desk.said if isinstance(message, Chunk)])
    assert offsets == [[], [], [0], [0, 256], [0, 256, 512]]
    assert desk.frames == [bytes(CONTENT[at : at + 256]) for at in (0, 256, 512)]
    assert Seal not in desk.kinds()


def test_bytes_of_a_failed_stream_are_not_kept() -> None:
    desk = Desk()
    stream = desk.begin()
    desk.sending.take(FAILED)
    desk.sending.feed(stream, CONTENT, len(CONTENT))
    assert stream.staged is None


def test_window_outlives_its_session(ring: SharedMemory) -> None:
    memory = SharedMemory.create("ring", 512)
    desk = Desk(memory)
    window = desk.sending.window(256, 256)
    desk.sending.end(PeerLostError("gone"))
    memory.close()
    window.view[:] = bytes(256)
    assert desk.sending.window(0, 256).view.nbytes == 256


def test_chunk_of_a_failed_stream_gives_its_place_back(ring: SharedMemory) -> None:
    desk = Desk(ring)
    stream = desk.begin()
    desk.sending.take(VersionOpened(stream.number))
    places = [desk.sending.credit(stream), desk.sending.credit(stream)]
    assert places == [0, 256]
    desk.sending.take(FAILED)
    assert desk.sending.credit(stream) is None
    for place in places:
        assert place is not None
        desk.sending.chunk(stream, 0, 256, place)
    assert Chunk not in desk.kinds()
    again = desk.begin()
    assert {desk.sending.credit(again), desk.sending.credit(again)} == {0, 256}


def test_credits_are_never_handed_out_twice() -> None:
    credits = Credits(3, 100, ring=True)
    held = [credits.take(1), credits.take(1), credits.take(2)]
    assert held == [0, 100, 200]
    assert credits.take(1) is None
    assert not credits.give_back(1, 200)
    assert not credits.give_back(1, -1)
    assert credits.give_back(1, 100)
    assert not credits.give_back(1, 100)
    assert credits.take(2) == 100
    assert credits.take(2) is None


@pytest.mark.parametrize(
    ("states", "staged", "live"),
    [
        (["receiving"], False, False),
        (["staged"], True, False),
        (["pushing"], True, False),
        (["live"], True, True),
        (["staged", "live", "retained"], True, True),
        (["retained"], True, True),
        (["evicted"], True, True),
        (["something new"], False, False),
    ],
)
def test_later_states_imply_the_earlier(states: list[str], staged: bool, live: bool) -> None:
    delivery = Delivery("here", VERSION, 5, 1, Bell())
    for state in states:
        delivery.take(VersionStatus(VERSION, state))
    assert (delivery.staged, delivery.live) == (staged, live)


def test_version_that_was_superseded_while_it_waited_is_staged_and_never_live() -> None:
    """Evicted is what becomes of a version that was live, but for the one of which the daemon says an error."""
    delivery = Delivery("here", VERSION, 5, 1, Bell())
    handle = Handle(VERSION, [delivery], delivery.bell)
    delivery.take(VersionStatus(VERSION, "evicted", ErrorInfo("publish", "superseded by m@r#2")))
    assert (delivery.staged, delivery.live, handle.state) == (True, False, "failed")
    handle.staged(0)
    with pytest.raises(PublishError, match=r"superseded by m@r#2 \(m@r#1 at here\)"):
        handle.live(0)


def test_version_that_was_put_back_may_go_live_later() -> None:
    delivery = Delivery("here", VERSION, 5, 1, Bell())
    for state in ("pushing", "staged", "pushing", "live"):
        assert not delivery.live
        delivery.take(VersionStatus(VERSION, state))
    assert delivery.live


def test_handle_tells_the_state_that_is_behind() -> None:
    bell = Bell()
    deliveries = [Delivery(name, VERSION, 5, 1, bell) for name in ("a", "b")]
    handle = Handle(VERSION, deliveries, bell)
    assert handle.state == "opening"
    deliveries[0].take(VersionStatus(VERSION, "live"))
    deliveries[1].take(VersionStatus(VERSION, "staged"))
    assert handle.state == "staged"
    handle.staged(0)
    deliveries[1].fail(CpeError("no"))
    assert handle.state == "failed"
    with pytest.raises(PublishError, match=r"m@r#1 failed at 1 of 2 daemons: b: no"):
        handle.live(float("inf"))


def test_report_prints_a_line_an_engine() -> None:
    engines = {
        "e0": EngineReport("updated", {"pause": 0.001, "load": 0.25}, 2_000_000_000, 8.0),
        "e1": EngineReport("failed", error=ErrorInfo("engine", "out of memory")),
        "e2": EngineReport("current"),
    }
    report = PublishReport(VERSION, {"ipc:///x": VersionReport(VERSION, 2_000_000_000, 7, 1.5, 0.25, engines)})
    assert str(report).splitlines() == [
        "m@r#1 live at ipc:///x: 7 tensors, 2.00 GB, staged in 1.500 s, pushed in 0.250 s",
        "engine  outcome  size     rate       phases",
        "e0      updated  2.00 GB  8.00 GB/s  pause 0.001 s, load 0.250 s",
        "e1      failed   -        -          engine: out of memory",
        "e2      current  -        -          holds it already",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "-"), (7, "7 B"), (999.4, "999 B"), (1000, "1.00 kB"), (4_012, "4.01 kB"), (2.5e13, "25.00 TB")],
)
def test_size_of_a_tiny_version_is_not_nothing(value: float, text: str) -> None:
    assert size_text(value) == text

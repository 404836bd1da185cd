"""What a publisher asks of daemons beside publishing: answers find their questions, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, MisuseError, PeerLostError, PublishError
from cpe_daemon.publisher.asking import Asking, rollback, wait_live
from cpe_daemon.publisher.delivery import Bell
from cpe_daemon.wire.messages import (
    ErrorReply,
    Message,
    Pong,
    PushReply,
    TrainerRollback,
    TrainerWait,
    VersionOpened,
    WaitReply,
)
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport


def version(number: int) -> VersionId:
    return VersionId("m", "r", number)


class FakeSession:
    """A session whose daemon answers at once, or not at all."""

    def __init__(self, bell: Bell, answer: Callable[[int], Message | None] = lambda _: None) -> None:
        self.said: list[Message] = []
        self.asking = Asking(self._send, bell)
        self._answer = answer

    def post(self, command: Callable[[], None], *, hurry: bool = True) -> None:
        command()

    def _send(self, message: Message) -> None:
        self.said.append(message)
        answer = self._answer(getattr(message, "stream", 0))
        if answer is not None:
            assert self.asking.take(answer)


def reported(number: int) -> Callable[[int], Message]:
    return lambda stream: PushReply(VersionReport(version(number), 8, 1), stream)


def test_every_daemon_is_asked_and_answers() -> None:
    bell = Bell()
    sessions = {"a": FakeSession(bell, reported(1)), "b": FakeSession(bell, reported(1))}
    report, errors = rollback(sessions, -1, 5.0, bell)
    assert (report.version, set(report.nodes), errors) == (version(1), {"a", "b"}, {})
    assert sessions["a"].said == [TrainerRollback(-1, -1)]


def test_rollback_that_had_nothing_to_do_leaves_nobody_behind() -> None:
    bell = Bell()
    done = VersionReport(version(1), 8, 1, engines={"e": EngineReport("current")}, note="m@r#1 is live already")
    report, _ = rollback({"a": FakeSession(bell, lambda stream: PushReply(done, stream))}, 1, 5.0, bell)
    assert report.behind == {}
    assert "a: m@r#1 is live already" in str(report)


def test_daemons_that_went_back_to_different_versions_are_named() -> None:
    bell = Bell()
    sessions = {"a": FakeSession(bell, reported(1)), "b": FakeSession(bell, reported(2))}
    with pytest.raises(PublishError, match=r"different versions: m@r#1 at a, m@r#2 at b; roll back with to="):
        rollback(sessions, -1, 5.0, bell)


def test_refusal_comes_back_as_the_daemon_s_error() -> None:
    bell = Bell()
    refusing = FakeSession(bell, lambda stream: ErrorReply(ErrorInfo("misuse", "none is retained"), stream))
    report, errors = rollback({"a": refusing, "b": FakeSession(bell, reported(1))}, 1, 5.0, bell)
    assert set(report.nodes) == {"b"}
    assert isinstance(errors["a"], MisuseError)
    assert str(errors["a"]) == "none is retained"


def test_daemon_that_does_not_answer_is_late() -> None:
    bell = Bell()
    _, errors = rollback({"a": FakeSession(bell)}, -1, 0.01, bell)
    assert isinstance(errors["a"], DeadlineError)
    assert str(errors["a"]) == "the daemon at a did not roll back within 0.01 s"


def test_answer_that_comes_too_late_is_nobody_s() -> None:
    bell = Bell()
    session = FakeSession(bell)
    rollback({"a": session}, -1, 0.01, bell)
    assert session.asking.take(reported(1)(-1))
    assert session.asking.take(ErrorReply(ErrorInfo("misuse", "late"), -1))


def test_what_is_said_of_contributions_is_left_alone() -> None:
    asking = FakeSession(Bell()).asking
    for message in (
        Pong("g"),
        VersionOpened(3),
        ErrorReply(ErrorInfo("digest", "x"), 3),
        ErrorReply(ErrorInfo("a", "b")),
    ):
        assert not asking.take(message)


def test_session_that_ends_answers_what_is_open_and_what_comes() -> None:
    bell = Bell()
    session = FakeSession(bell)
    question = session.asking.begin()
    session.asking.end(PeerLostError("the daemon ended"))
    assert isinstance(question.error, PeerLostError)
    _, errors = rollback({"a": session}, -1, 5.0, bell)
    assert isinstance(errors["a"], PeerLostError)
    assert session.said == []


def test_wait_asks_for_the_run_and_returns_what_is_live() -> None:
    bell = Bell()
    session = FakeSession(bell, lambda stream: WaitReply(version(7), stream))
    live, errors = wait_live({"a": session}, 5, None, 30.0, bell)
    assert (live, errors) == ({"a": version(7)}, {})
    wait_live({"a": session}, 5, "other", 30.0, bell)
    assert session.said == [TrainerWait(-1, 5, 30.0), TrainerWait(-2, 5, 30.0, "other")]

"""What a trainer asks of a daemon beside publishing: to roll back, or to be told when a version is live.

A question has a number below 0, which the answer comes with: contributions have those above.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, DeadlineError, PublishError, from_code
from cpe_daemon.publisher.delivery import Bell
from cpe_daemon.publisher.report import PublishReport
from cpe_daemon.wire.messages import ErrorReply, Message, PushReply, TrainerRollback, TrainerWait, WaitReply

Ask = Callable[[int], Message]
"""Makes a question, given its number."""

_MARGIN_SECONDS: Final = 5.0
"""The daemon keeps the deadline of a wait, and says how far the version is; this is for it to do so."""


@dataclass(slots=True, eq=False)
class Question:
    """One question on its way. Guarded by the bell's lock."""

    number: int
    answer: Message | None = None
    error: CpeError | None = None


class Asking:
    """The questions of one session.

    Args:
        send: sends a message; the link's thread calls it.
        bell: rings when an answer comes.
    """

    def __init__(self, send: Callable[[Message], None], bell: Bell) -> None:
        self._send = send
        self._bell = bell
        self._numbers = itertools.count(1)
        self._open: dict[int, Question] = {}
        self._over: CpeError | None = None

    def begin(self) -> Question:
        """Make a question, for `ask`; if the session is over it is answered already. Any thread."""
        with self._bell.lock:
            question = Question(-next(self._numbers), error=self._over)
            if self._over is None:
                self._open[question.number] = question
            return question

    def give_up(self, question: Question) -> None:
        """Nobody waits for the answer any more. Any thread."""
        with self._bell.lock:
            self._open.pop(question.number, None)

    def ask(self, question: Question, make: Ask) -> None:
        """Send it. The link's thread."""
        if question.number in self._open:
            self._send(make(question.number))

    def take(self, message: Message) -> bool:
        """Take an answer; False if the message is none. The link's thread."""
        number = getattr(message, "stream", 0)
        with self._bell.lock:
            question = self._open.pop(number, None)
            if question is None:
                return isinstance(message, PushReply | WaitReply) or number < 0  # nobody waits for it any more
            if isinstance(message, ErrorReply):
                question.error = from_code(message.error.code, message.error.message)
            else:
                question.answer = message
            self._bell.ring()
            return True

    def end(self, error: CpeError) -> None:
        """The session is over: no answer comes. The link's thread."""
        with self._bell.lock:
            self._over = error
            for question in self._open.values():
                question.error = error
            self._open.clear()
            self._bell.ring()


class _Session(Protocol):
    """What is needed of a session."""

    asking: Asking

    def post(self, command: Callable[[], None], *, hurry: bool = True) -> None:
        """Have the link's thread run it."""
        ...


def ask_all(
    sessions: Mapping[str, _Session], make: Ask, what: str, timeout: float, bell: Bell
) -> tuple[dict[str, Message], dict[str, CpeError]]:
    """Ask every daemon the same, and wait up to ``timeout`` seconds; return answers and errors by endpoint."""
    deadline = time.monotonic() + timeout
    asked: dict[str, Question] = {}
    for endpoint, session in sessions.items():
        question = asked[endpoint] = session.asking.begin()
        session.post(lambda asking=session.asking, question=question: asking.ask(question, make))  # type: ignore[misc]
    with bell.lock:
        while any(question.answer is None and question.error is None for question in asked.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            bell.changed.wait(left)
    answers: dict[str, Message] = {}
    errors: dict[str, CpeError] = {}
    for endpoint, question in asked.items():
        sessions[endpoint].asking.give_up(question)
        if question.answer is not None:
            answers[endpoint] = question.answer
        else:
            late = DeadlineError(f"the daemon at {endpoint} did not {what} within {timeout:g} s")
            errors[endpoint] = question.error or late
    return answers, errors


def rollback(
    sessions: Mapping[str, _Session], number: int, timeout: float, bell: Bell
) -> tuple[PublishReport, dict[str, CpeError]]:
    """Have every daemon roll back; return what that did, and the errors by endpoint: some, or there is a report.

    ``number`` -1: to the version that was live last.

    Raises:
        PublishError: several daemons went back to different versions, since none was named.
    """
    answers, errors = ask_all(sessions, lambda stream: TrainerRollback(stream, number), "roll back", timeout, bell)
    nodes = {endpoint: answer.report for endpoint, answer in answers.items() if isinstance(answer, PushReply)}
    versions = {report.version for report in nodes.values()}
    if len(versions) > 1:
        said = ", ".join(f"{report.version} at {endpoint}" for endpoint, report in nodes.items())
        raise PublishError(f"daemons rolled back to different versions: {said}; roll back with to=")
    return PublishReport(versions.pop() if versions else VersionId("", "", number), nodes), errors


def wait_live(
    sessions: Mapping[str, _Session], number: int, run: str | None, timeout: float, bell: Bell
) -> tuple[dict[str, VersionId], dict[str, CpeError]]:
    """Wait until that version or a later one is live at every daemon; return which, and the errors, by endpoint."""
    answers, errors = ask_all(
        sessions,
        lambda stream: TrainerWait(stream, number, timeout, run or ""),
        f"tell that version {number} is live",
        timeout + _MARGIN_SECONDS,
        bell,
    )
    return {name: answer.version for name, answer in answers.items() if isinstance(answer, WaitReply)}, errors

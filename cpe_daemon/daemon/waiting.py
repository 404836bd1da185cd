"""Who waits for a version to be live, and what they are told: told when it happens, for nobody looks again and again.

Each wait has a deadline and its state is told when that passes. How many there may be is bounded; an operator who does
not say again that he waits is forgotten, and a trainer with his link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.types import VersionId
from cpe_daemon.daemon.operations import Sender
from cpe_daemon.errors import (
    BusyError,
    CpeError,
    DeadlineError,
    ManifestError,
    MisuseError,
    VersionRefusedError,
    from_code,
)
from cpe_daemon.ingest.news import missing
from cpe_daemon.ingest.session import Session
from cpe_daemon.links.router import Handler
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import ErrorReply, Message, TrainerWait, WaitReply, WaitRequest
from cpe_daemon.wire.operator import WAIT_FORGOTTEN_SECONDS
from cpe_daemon.wire.reports import ErrorInfo

log = structlog.get_logger(__name__)

MAX_WAITERS: Final = 256
MAX_OF_ONE: Final = 16
"""At a time: of all, and of one client."""

_LONGEST_SECONDS: Final = 7 * 86_400.0
_BEGUN: Final = (VersionState.RECEIVING, VersionState.STAGED, VersionState.PUSHING)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version that somebody waits for. ``run`` "": the newest of the model's; ``model`` "": the only one."""

    model: str
    run: str
    number: int

    def __str__(self) -> str:
        return f"{self.model}{f'@{self.run}' if self.run else ''}#{self.number}"


@dataclass(slots=True, eq=False)
class _Waiter:
    """One wait. ``gone`` tells whether whoever waits has left; ``timer`` ends it, or looks whether he has."""

    peer: bytes
    stream: int
    wanted: Wanted
    seconds: float
    until: float
    gone: Callable[[], bool]
    timer: asyncio.TimerHandle | None = None


def reached(versions: Iterable[Version], wanted: Wanted, before: Iterable[VersionId] = ()) -> VersionId | None:
    """Return the version that makes a wait's end: the one that is live, if it is that one or a later one of its run.

    Args:
        versions: of this node.
        wanted: what is waited for.
        before: versions that engines serve since a daemon before this one, and whose bytes are not here.

    Raises:
        MisuseError: no model was named, and there are several.
        CpeError: the version has failed; why.
    """
    known, before = list(versions), list(before)
    models = {version.id.model for version in known if version.contributions} | {version.model for version in before}
    if not wanted.model and len(models) > 1:
        raise MisuseError(f"this node holds versions of {', '.join(sorted(models))}: say which model is meant")
    fitting = sorted(
        (version for version in known if wanted.model in ("", version.id.model)), key=lambda version: version.opened_at
    )
    before = [version for version in before if wanted.model in ("", version.model)]
    newest = [*before, *(version.id for version in fitting if not _was_refused(version))][-1:]
    run = wanted.run or (newest[0].run if newest else "")
    live = [*before, *(version.id for version in fitting if version.state is VersionState.LIVE)]
    enough = [version for version in live if version.run == run and version.number >= wanted.number]
    if enough:
        return enough[-1]
    meant = [version for version in fitting if version.id.run == run or (not wanted.run and _was_refused(version))]
    same = [version for version in meant if version.id.number == wanted.number]
    if same and same[-1].state is VersionState.FAILED:
        failed = same[-1]
        code, why = (failed.error.code, failed.error.message) if failed.error else (CpeError.code, "nobody said why")
        raise from_code(code, f"{failed.id} has failed: {why}")
    return None


def _was_refused(version: Version) -> bool:
    """Whether a version fits no engine: none of it was taken, and its run has not begun by it."""
    return version.state is VersionState.FAILED and isinstance(version.error, ManifestError)


def where(versions: Iterable[Version], wanted: Wanted, *, automatic: bool) -> str:
    """Say how far a version is that is not live, and what is."""
    known = [v for v in versions if wanted.model in ("", v.id.model) and wanted.run in ("", v.id.run)]
    near = [v for v in known if v.id.number == wanted.number or (v.id.number > wanted.number and v.state in _BEGUN)]
    said = "nothing of it has come"
    if near:
        version = near[-1]
        said = f"{version.id} is {version.state}"
        if version.state is VersionState.RECEIVING:
            said += f", for {missing(version)}"
        if version.state is VersionState.STAGED and not automatic:
            said += f", and waits for `cpe push {version.id.model}`"
    live = [version for version in known if version.state is VersionState.LIVE]
    return f"{said}; {live[-1].id} is live" if live else f"{said}; none is live"


class Waiting:
    """All who wait. Belongs to the event loop.

    Args:
        catalogue: tells of every change.
        session: a trainer's link, by its routing id; raises if there is none.
        automatic: whether staged versions are pushed by themselves; for what is said of those that are not.
        before: the versions that engines serve since a daemon before this one, and whose bytes are not here.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        session: Callable[[bytes], Session],
        automatic: bool,
        before: Callable[[], Iterable[VersionId]] = tuple,
    ) -> None:
        self._catalogue = catalogue
        self._before = before
        self._session = session
        self._automatic = automatic
        self._waiters: dict[tuple[bytes, int], _Waiter] = {}
        self._sender: Sender | None = None
        catalogue.watch(self._on_version)

    def __len__(self) -> int:
        return len(self._waiters)

    def handlers(self) -> Mapping[type[Message], Handler]:
        """The messages that are answered here."""
        return {WaitRequest: self._on_operator, TrainerWait: self._on_trainer}

    def connect(self, sender: Sender) -> None:
        """Answer through ``sender`` from now on."""
        self._sender = sender

    def close(self) -> None:
        """Forget everybody."""
        for waiter in list(self._waiters.values()):
            self._forget(waiter)

    def _on_operator(self, peer: bytes, request: WaitRequest, _: object) -> None:
        heard_at = asyncio.get_running_loop().time()
        wanted = Wanted(request.model, request.run, request.number)
        self._wait(peer, 0, wanted, request.seconds, lambda: _now() - heard_at >= WAIT_FORGOTTEN_SECONDS)

    def _on_trainer(self, peer: bytes, request: TrainerWait, _: object) -> None:
        session = self._session(peer)
        wanted = Wanted(session.hello.model, request.run or session.hello.run, request.number)
        self._wait(peer, request.stream, wanted, request.seconds, lambda: session.gone)

    def _wait(self, peer: bytes, stream: int, wanted: Wanted, seconds: float, gone: Callable[[], bool]) -> None:
        """Answer at once, or later.

        Raises:
            MisuseError: that cannot be waited for.
            VersionRefusedError: nothing of that run is published any more.
            BusyError: too many wait.
            CpeError: the version has failed.
        """
        if wanted.number < 0 or not 0 < seconds <= _LONGEST_SECONDS:
            raise MisuseError(f"a wait for version {wanted.number} of {seconds:g} s makes no sense")
        before = self._waiters.get((peer, stream))
        if before is not None:
            self._forget(before)
        waiter = _Waiter(peer, stream, wanted, seconds, _now() + seconds, gone)
        if self._ends(waiter):
            return
        if sum(other == peer for other, _ in self._waiters) >= MAX_OF_ONE:
            raise BusyError(f"this client waits for {MAX_OF_ONE} versions already")
        if len(self._waiters) >= MAX_WAITERS:
            for other in [other for other in self._waiters.values() if other.gone()]:
                self._forget(other)
        if len(self._waiters) >= MAX_WAITERS:
            raise BusyError(f"{MAX_WAITERS} clients wait for versions of this node already")
        self._waiters[peer, stream] = waiter
        self._set_timer(waiter)

    def _ends(self, waiter: _Waiter) -> bool:
        """Whether a wait is over; whoever waits is told then.

        Raises:
            CpeError: it is over because nothing will come of it.
        """
        live = reached(self._catalogue, waiter.wanted, self._before())
        if live is not None:
            self._answer(waiter, WaitReply(live, waiter.stream))
            return True
        history = self._catalogue.numbers.histories.get(waiter.wanted.model)
        run = waiter.wanted.run
        if history is not None and run and history.run not in (None, run) and run in history.used:
            raise VersionRefusedError(
                f"{waiter.wanted} will not be live: run {run!r} was superseded by run {history.run!r}"
            )
        return False

    def _on_version(self, version: Version) -> None:
        for waiter in list(self._waiters.values()):
            if waiter.wanted.model not in ("", version.id.model):
                continue
            try:
                self._ends(waiter)
            except CpeError as error:
                self._answer(waiter, _refusal(error, waiter.stream))

    def _set_timer(self, waiter: _Waiter) -> None:
        at = min(waiter.until, _now() + WAIT_FORGOTTEN_SECONDS)
        waiter.timer = asyncio.get_running_loop().call_at(at, self._on_time, waiter)

    def _on_time(self, waiter: _Waiter) -> None:
        """The deadline has passed, or it is time to see whether anybody waits still."""
        if _now() >= waiter.until:
            state = where(self._catalogue, waiter.wanted, automatic=self._automatic)
            error = DeadlineError(f"{waiter.wanted} is not live after {round(waiter.seconds, 2):g} s: {state}")
            self._answer(waiter, _refusal(error, waiter.stream))
        elif waiter.gone():
            self._forget(waiter)
        else:
            self._set_timer(waiter)

    def _answer(self, waiter: _Waiter, answer: Message) -> None:
        self._forget(waiter)
        if self._sender is None or not self._sender.send(waiter.peer, answer):
            log.debug("waiter.left", version=str(waiter.wanted))

    def _forget(self, waiter: _Waiter) -> None:
        if waiter.timer is not None:
            waiter.timer.cancel()
        if self._waiters.get((waiter.peer, waiter.stream)) is waiter:
            del self._waiters[waiter.peer, waiter.stream]


def _refusal(error: CpeError, stream: int) -> ErrorReply:
    return ErrorReply(ErrorInfo(error.code, error.message), stream)


def _now() -> float:
    return asyncio.get_running_loop().time()

"""One greeting's worth of a link: its terms, its landing ring, and whether the daemon is still the one greeted.

Belongs to the link's thread, but for `Session.post`, which any thread calls.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import (
    AccessError,
    CpeError,
    PeerError,
    PeerLostError,
    ProtocolError,
    ResourceError,
    from_code,
)
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.links.handoff import Tether, claim
from cpe_daemon.links.permission import check_permission
from cpe_daemon.publisher.asking import Asking
from cpe_daemon.publisher.delivery import Bell
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.pagelock import PageLock
from cpe_daemon.publisher.sending import Sending
from cpe_daemon.wire.messages import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    ErrorReply,
    Farewell,
    Message,
    Ping,
    Pong,
    TrainerBye,
    TrainerHello,
    TrainerWelcome,
)

log = logging.getLogger(__name__)

_WELCOME_SECONDS: Final = 5.0
_SLICE_SECONDS: Final = 0.25
"""The longest that the link's thread looks at nothing but its socket."""
_SEND_SECONDS: Final = 2.0
"""Credits keep the socket's queue short: a message that cannot be sent has no connection to go over."""
_TURN: Final = 64
"""Messages taken before commands get their turn."""
_LAST_WORDS_SECONDS: Final = 0.1
_MISSED: Final = 3
_MARGIN_SECONDS: Final = 1.0
"""A daemon that leaves pings unanswered for ``_MISSED`` intervals and this is lost."""


class FarewellError(PeerLostError):
    """The daemon says that it stops: no fault of anybody's, and another will come."""


@dataclass(frozen=True, slots=True)
class Landing:
    """The connection that tells each side of the other's end, and the ring, if this process could map it."""

    tether: Tether
    ring: SharedMemory | None

    def close(self) -> None:
        """Let go of both. The memory itself lives until the last view of it is gone."""
        self.tether.close()
        if self.ring is not None:
            self.ring.close()


class Session:
    """A greeted daemon.

    Args:
        dealer: the connection; the session's to close from now on.
        welcome: the terms.
        bell: rings when something changes.
        gpus: of this process: once it uses one, the landing ring is page-locked.
        send_timeout: see `Sending`.
    """

    def __init__(self, dealer: Dealer, welcome: TrainerWelcome, bell: Bell, gpus: Gpus, *, send_timeout: float) -> None:
        self.welcome = welcome
        self._gpus = gpus
        self._dealer = dealer
        self._landing = _land(dealer.endpoint, welcome)
        send = functools.partial(dealer.send, timeout=_SEND_SECONDS)
        ring = self._landing.ring if self._landing else None
        self.sending = Sending(send, welcome, ring, bell, send_timeout=send_timeout)
        self.asking = Asking(send, bell)
        self._unlocked = ring
        self._commands: deque[Callable[[], None]] = deque()
        self._post_lock = threading.Lock()
        self._ended = False
        self._ping_at = time.monotonic() + welcome.heartbeat_seconds
        self._unanswered_since: float | None = None
        self._doubt: ProtocolError | None = None
        self._pings = 0
        self._pongs = 0

    @property
    def landing(self) -> bool:
        """Whether bytes go through a landing ring."""
        return self._landing is not None and self._landing.ring is not None

    @property
    def cut(self) -> bool:
        """Whether the daemon has ended, as far as its tether tells; any thread."""
        return self._landing is not None and self._landing.tether.cut

    def post(self, command: Callable[[], None], *, hurry: bool = True) -> None:
        """Have ``command`` run by the link's thread; dropped if the session is over. Any thread.

        Without ``hurry`` it waits for the next one that does, or for the thread to wake by itself within a moment.
        """
        with self._post_lock:
            if self._ended:
                return
            self._commands.append(command)
            if hurry:
                self._dealer.wake()

    def hurry(self) -> None:
        """Have what was posted run now. Any thread."""
        self.post(lambda: None)

    def turn(self) -> None:
        """Run what was posted, send what can be sent, take what has come, and wait for more for a moment.

        Raises:
            PeerLostError: the daemon is gone, or is another one.
            FarewellError: it is about to be gone.
            ProtocolError: the daemon refuses to understand this side.
        """
        while self._commands:
            self._commands.popleft()()
        if self._unlocked is not None and self._gpus.ready():
            self._lock_pages(self._unlocked)
        self.sending.pump()
        now = time.monotonic()
        if now >= self._ping_at:
            self._ping(now)
        timeout = min(_SLICE_SECONDS, self._ping_at - now)
        for _ in range(_TURN):
            if not self._receive(timeout):
                break
            timeout = 0.0
        self._check()

    def fence(self, seconds: float) -> None:
        """Wait up to ``seconds`` until the daemon has taken everything that was sent.

        Raises:
            PeerError: it is gone.
        """
        deadline = time.monotonic() + seconds
        self._ping(time.monotonic())
        while self._pongs < self._pings and (left := deadline - time.monotonic()) > 0:
            self._receive(min(left, _SLICE_SECONDS))
            self._check()

    def part(self, error: CpeError, seconds: float) -> None:
        """Fail whatever was expected of the session, say goodbye, and give the daemon ``seconds`` to hear it."""
        self.sending.end(error)
        self.asking.end(error)
        if self.cut:
            return
        deadline = time.monotonic() + seconds
        try:
            self._dealer.send(TrainerBye(), timeout=seconds)
            self._pings += 1  # it is answered by a Pong, as a Ping is
            while self._pongs < self._pings and (left := deadline - time.monotonic()) > 0:
                self._receive(left)
        except PeerError as gone:
            log.debug("nobody heard the goodbye: %s", gone.message)

    def end(self, error: CpeError) -> None:
        """Fail whatever was expected of the session, and close it."""
        with self._post_lock:
            self._ended = True
            self._commands.clear()
        self.sending.end(error)
        self.asking.end(error)
        if self.sending.page_lock is not None:
            self.sending.page_lock.close()
        if self._landing is not None:
            self._landing.close()
        self._dealer.close()

    def _lock_pages(self, ring: SharedMemory) -> None:
        """Have GPUs copy to the ring directly: here, so that no publish waits for it."""
        try:
            device = self._gpus.active()
            if device is None:
                return  # not yet
            self.sending.page_lock = PageLock(self._gpus, device, ring)
        except ResourceError as error:
            self._gpus.warn_unlocked(ring.nbytes, error)
        self._unlocked = None

    def _ping(self, now: float) -> None:
        self._dealer.send(Ping(), timeout=_SEND_SECONDS)
        self._pings += 1
        self._ping_at = now + self.welcome.heartbeat_seconds
        if self._unanswered_since is None:
            self._unanswered_since = now

    def _receive(self, timeout: float) -> bool:
        """Take one message; False if none came."""
        try:
            received = self._dealer.receive(timeout)
        except ProtocolError as error:
            log.warning("ignored a message of %s: %s", self._dealer.endpoint, error.message)
            return True
        if received is None:
            return False
        self._unanswered_since = None
        self._take(received[0])
        return True

    def _take(self, message: Message) -> None:
        if self.asking.take(message):
            return
        if isinstance(message, Pong):
            self._on_pong(message)
        elif isinstance(message, Farewell):
            raise FarewellError(f"the daemon at {self._dealer.endpoint} said farewell: {message.reason}")
        elif isinstance(message, ErrorReply) and message.error.code == ProtocolError.code:
            # Either we broke the rules, or the daemon was restarted and does not know us: its next answer tells.
            if message.stream == 0:
                raise PeerLostError(f"{self._dealer.endpoint} does not know this trainer any more: it was restarted")
            self._doubt = ProtocolError(f"{message.error.message} (said {self._dealer.endpoint})")
            self._ping(time.monotonic())
        elif isinstance(message, ErrorReply) and message.error.code == AccessError.code:
            raise AccessError(f"{message.error.message} (said {self._dealer.endpoint})")  # nothing more will be taken
        elif isinstance(message, ErrorReply) and message.stream == 0:
            log.warning("%s refused a message: %s", self._dealer.endpoint, message.error.message)
        else:
            self.sending.take(message)

    def _on_pong(self, pong: Pong) -> None:
        self._pongs += 1
        if pong.generation != self.welcome.generation:
            raise PeerLostError(f"the daemon at {self._dealer.endpoint} was restarted")
        if self._doubt is not None:
            raise self._doubt

    def _check(self) -> None:
        if self.cut:
            while self._receive(_LAST_WORDS_SECONDS):
                continue  # said before it ended, perhaps that the version is live; a tether is faster than a message
            raise PeerLostError(f"the daemon at {self._dealer.endpoint} ended")
        limit = _MISSED * self.welcome.heartbeat_seconds + _MARGIN_SECONDS
        if self._unanswered_since is not None and time.monotonic() - self._unanswered_since > limit:
            raise PeerLostError(f"the daemon at {self._dealer.endpoint} has been silent for {limit:g} s")
        self.sending.give_up_stalled()


def greet(dealer: Dealer, hello: TrainerHello, cancelled: Callable[[], bool]) -> TrainerWelcome | None:
    """Introduce this rank, as soon as somebody listens; return the terms, or None if ``cancelled`` says so.

    Raises:
        PeerLostError: somebody listens and does not answer.
        FarewellError: the daemon there is about to stop.
        AccessError: this user may not connect there.
        CpeError: the daemon refuses; rebuilt from its code.
    """
    while True:
        if cancelled():
            return None
        check_permission(dealer.endpoint)
        try:
            dealer.send(hello, timeout=_SLICE_SECONDS)
            break
        except PeerLostError:
            continue  # not there yet
    deadline = time.monotonic() + _WELCOME_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if cancelled():
            return None
        received = dealer.receive(min(left, _SLICE_SECONDS))
        message = received[0] if received else None
        if isinstance(message, TrainerWelcome):
            return _checked(dealer.endpoint, message)
        if isinstance(message, Farewell):
            raise FarewellError(f"the daemon at {dealer.endpoint} takes no trainers: {message.reason}")
        if isinstance(message, ErrorReply):
            raise from_code(message.error.code, f"{message.error.message} (said {dealer.endpoint})")
    raise PeerLostError(f"the daemon at {dealer.endpoint} did not answer a hello for {_WELCOME_SECONDS:g} s")


def _checked(endpoint: str, welcome: TrainerWelcome) -> TrainerWelcome:
    if not OLDEST_PROTOCOL <= welcome.protocol <= PROTOCOL:
        raise ProtocolError(
            f"{endpoint} speaks protocol {welcome.protocol}; this publisher speaks {OLDEST_PROTOCOL} to {PROTOCOL}"
        )
    if min(welcome.credits, welcome.chunk_bytes, welcome.chunk_frames) < 1 or welcome.heartbeat_seconds <= 0:
        raise ProtocolError(f"{endpoint} offers impossible terms: {welcome}")
    return welcome


def _land(endpoint: str, welcome: TrainerWelcome) -> Landing | None:
    """Fetch the landing ring; without one, bytes go through the socket."""
    if not welcome.landing_token:
        return None
    try:
        fd, tether = claim(welcome.handoff, welcome.landing_token)
    except PeerLostError as error:
        log.warning("no landing ring from %s, sending bytes through the socket: %s", endpoint, error.message)
        return None
    try:
        return Landing(tether, _mapped(fd, welcome.credits * welcome.chunk_bytes))
    except (PeerError, ResourceError) as error:
        log.warning("no landing ring from %s, sending bytes through the socket: %s", endpoint, error.message)
        return Landing(tether, None)  # kept: the daemon takes the end of a tether for the end of this process


def _mapped(fd: int, nbytes: int) -> SharedMemory:
    ring = SharedMemory.attach(fd, nbytes, writable=True)
    try:
        ring.prefault(0, nbytes)
    except ResourceError:
        ring.close()
        raise
    return ring

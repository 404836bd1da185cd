"""The connection to one daemon, and the thread that owns it: greet, converse, and greet again after a loss."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import AccessError, CpeError, PeerError, PeerLostError, PublishError, from_code
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.links.keys import Credentials
from cpe_daemon.publisher.delivery import Bell
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.session import FarewellError, Session, greet
from cpe_daemon.wire.messages import FrontReply, TrainerHello

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0
_REFUSED_PAUSE_SECONDS: Final = 30.0
"""Before the daemon is greeted again: after a loss, doubling; after a refusal, unless a publish wants to know."""
_GRACE_SECONDS: Final = 2.0
"""A daemon that has been away for longer than the connect timeout gets so long to show itself in each publish."""
_FENCE_SECONDS: Final = 1.0
_GOODBYE_SECONDS: Final = 1.0


class Link:
    """One daemon, as one trainer rank knows it.

    Args:
        endpoint: of the daemon.
        hello: who this rank is.
        bell: guards ``session`` and ``refusal``, and rings when they change.
        gpus: of this process.
        send_timeout: see `cpe_daemon.publisher.sending.Sending`.
        credentials: keys, if the endpoint takes any.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(
        self,
        endpoint: str,
        hello: TrainerHello,
        bell: Bell,
        gpus: Gpus,
        *,
        send_timeout: float,
        credentials: Credentials | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._credentials = credentials
        self._hello = hello
        self._bell = bell
        self._gpus = gpus
        self._send_timeout = send_timeout
        self._session: Session | None = None
        self._refusal: CpeError | None = None
        self._greeting = 0
        self._refused = 0  # the greeting that was refused last
        self._away_since = time.monotonic()
        self._closing = threading.Event()
        self._greet_now = threading.Event()
        self._dealer: Dealer | None = Dealer(endpoint, FrontReply, credentials)
        self._thread = threading.Thread(target=self._run, name=f"cpe-link {endpoint}", daemon=True)
        self._thread.start()

    def ready(self, version: VersionId | str, connect_timeout: float) -> Session:
        """Return the session, waiting up to ``connect_timeout`` seconds from when the daemon was lost.

        Raises:
            CpeError: the daemon refuses this rank.
            PeerLostError: nobody answers there.
        """
        with self._bell.lock:
            asked = self._greeting  # what is under way may be refused for what is mended by now
            self._greet_now.set()
            now = time.monotonic()
            if self._session is not None and self._session.cut:
                self._away_since = now  # the thread has not noticed yet
            deadline = max(self._away_since + connect_timeout, now + min(_GRACE_SECONDS, connect_timeout))
            while self._session is None or self._session.cut:
                if self._refused > asked and self._refusal is not None:
                    raise from_code(self._refusal.code, self._refusal.message)
                left = deadline - time.monotonic()
                if left <= 0 or self._closing.is_set():
                    away = time.monotonic() - self._away_since
                    raise PeerLostError(
                        f"no daemon answered at {self.endpoint} for {away:.1f} s (connecting, for {version});"
                        " is it running there?"
                    )
                self._bell.changed.wait(left)
            return self._session

    def close_soon(self) -> None:
        """Tell the thread to abandon what is not sealed, and to end."""
        self._closing.set()
        with self._bell.lock:
            self._greet_now.set()  # stays set: it is cleared only on the way to another greeting
            session = self._session
            self._bell.ring()
        if session is not None:
            session.hurry()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end up to ``timeout`` seconds; False if it did not come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._closing.is_set():
            with self._bell.lock:
                self._greet_now.clear()
                self._greeting += 1
            try:
                session = self._greet()
            except PeerLostError as error:
                log.log(_loudness(error), "%s", error.message)
                self._greet_now.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            except CpeError as error:
                log.warning("refused: %s", error.message)
                self._refuse(error)
                self._greet_now.wait(_REFUSED_PAUSE_SECONDS)
                continue
            except Exception as error:  # task boundary: a publish that waits for this thread must learn why it cannot
                log.exception("cannot greet %s", self.endpoint)
                self._refuse(CpeError(f"cannot greet {self.endpoint}: {error!r}"))
                self._greet_now.wait(_REFUSED_PAUSE_SECONDS)
                continue
            if session is not None:
                pause = self._converse_and_pause(session, pause)
                self._greet_now.wait(pause)
        if self._dealer is not None:
            self._dealer.close()

    def _converse_and_pause(self, session: Session, pause: float) -> float:
        """Serve a session to its end; return for how long to leave the daemon alone then."""
        began = time.monotonic()
        if isinstance(self._converse(session), FarewellError):
            return _LONGEST_PAUSE_SECONDS  # it is still there for a moment
        if time.monotonic() - began > _LONGEST_PAUSE_SECONDS:
            return _FIRST_PAUSE_SECONDS
        return min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _greet(self) -> Session | None:
        """Return a session; None if the thread is to end."""
        dealer, self._dealer = self._dealer or Dealer(self.endpoint, FrontReply, self._credentials), None
        kept = False
        try:
            welcome = greet(dealer, self._hello, self._closing.is_set)
            if welcome is None:
                return None
            session = Session(dealer, welcome, self._bell, self._gpus, send_timeout=self._send_timeout)
            kept = True
        finally:
            if not kept:
                dealer.close()
        with self._bell.lock:
            self._session, self._refusal = session, None
            self._bell.ring()
        return session

    def _converse(self, session: Session) -> CpeError:
        """Serve a session to its end; return why it ended."""
        ended: CpeError = PublishError(f"the publisher was closed before {self.endpoint} was done")
        try:
            while not self._closing.is_set():
                session.turn()
            session.sending.abandon_all(ended)
            session.fence(_FENCE_SECONDS)
        except FarewellError as error:
            log.info("%s", error.message)
            ended = FarewellError(error.message)
            session.part(ended, _GOODBYE_SECONDS)
        except (PeerError, AccessError) as error:
            log.warning("%s", error.message)
            ended = from_code(error.code, error.message)  # without the traceback, which holds the session's memory
        except Exception as error:  # task boundary: what waits for this session must fail, not hang
            log.exception("the link to %s failed", self.endpoint)
            ended = CpeError(f"the link to {self.endpoint} failed: {error!r}")
        with self._bell.lock:
            self._session = None
            self._away_since = time.monotonic()
            self._bell.ring()
        session.end(ended)
        return ended

    def _refuse(self, error: CpeError) -> None:
        with self._bell.lock:
            self._refusal = from_code(error.code, error.message)
            self._refused = self._greeting
            self._bell.ring()


def _loudness(error: PeerLostError) -> int:
    """How loudly to say that a greeting failed: that a daemon which said that it stops still does is no news."""
    return logging.DEBUG if isinstance(error, FarewellError) else logging.WARNING

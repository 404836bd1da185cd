"""The daemon's side of CURVE: its key pair, whom it lets in, and the answers that libzmq wants at every handshake.

libzmq asks by ZAP, over an inproc socket, whether a key may connect. The answers are given by pyzmq's authenticator;
the task that hands them over is the daemon's own, so that its end would end the daemon, and not leave clients waiting.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
import zmq
from zmq.auth import Authenticator

from cpe_daemon.core.rates import Rates
from cpe_daemon.errors import ConfigError
from cpe_daemon.links.access import Access
from cpe_daemon.links.allowed import ALLOWED, AllowedFile
from cpe_daemon.links.blocking import Patience
from cpe_daemon.links.keys import DAEMON_NAME, SECRET_SUFFIX, KeyPair, load_pair

log = structlog.get_logger(__name__)

_DOMAIN: Final = "cpe"
_ADDRESS: Final = 3
"""Which part of a question is the address that it is about."""

_LOGGED_PER_SECOND: Final = 1.0
_CONNECTED_BURST: Final = 2000
_REFUSED_BURST: Final = 20
"""Lines in the log: a training job's ranks come all at once, and strangers must not fill it."""

_READ_SECONDS: Final = 5.0
_MOST_READS: Final = 4
"""Reads of the list that may hang at a time. As long as there are fewer, each look at it is a fresh one."""

_EVERYBODY: Final = b""


def secure(socket: zmq.Socket[bytes], pair: KeyPair) -> None:
    """Have every endpoint that is bound from now on take only clients that the authenticator lets in.

    It fails closed: while nobody answers, nobody gets in.
    """
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())
    socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class Curve:
    """The daemon's keys. Belongs to the event loop, but for `load`.

    Args:
        directory: holds the daemon's pair and the list of allowed clients.
        on_refused: called at each handshake that is refused for its key.
    """

    def __init__(self, directory: Path, *, on_refused: Callable[[], None] = lambda: None) -> None:
        self._directory = directory
        self._on_refused = on_refused
        self._list = AllowedFile(directory / ALLOWED)
        self._patience = Patience(_READ_SECONDS, most=_MOST_READS, name="cpe-keys")
        self._pair: KeyPair | None = None
        self._authenticator: Authenticator | None = None
        self._asked_from = ""
        self._connected = Rates(_LOGGED_PER_SECOND, _CONNECTED_BURST)
        self._refused = Rates(_LOGGED_PER_SECOND, _REFUSED_BURST)
        self.access = Access({})
        self.trouble = ""
        """Why the list that is in effect is not the file's; empty if it is."""

    @property
    def pair(self) -> KeyPair:
        """The daemon's own pair.

        Raises:
            ConfigError: it was not loaded.
        """
        if self._pair is None:
            raise ConfigError("the daemon's keys were not loaded")
        return self._pair

    def load(self) -> None:
        """Read the pair and the list. Blocks.

        Raises:
            ConfigError: one cannot be used; says what to do.
        """
        path = self._directory / f"{DAEMON_NAME}{SECRET_SUFFIX}"
        try:
            path.stat()
        except FileNotFoundError:
            raise ConfigError(
                f"tcp endpoints need a key pair of the daemon's, and there is none at {path}; make one: cpe keys new"
                f" --daemon --dir {self._directory} (or set ingest.insecure: true to do without)"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be looked at: {error.strerror or error}; this daemon's user (uid {os.getuid()}) has to"
                f" own {self._directory} and what is in it"
            ) from None
        self._pair = load_pair(path)
        self.access.replace(self._list.read_if_changed() or {})

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Begin to be asked, by every socket of ``context`` that was made secure; `answer` has to run."""
        self._authenticator = Authenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, self)
        if not len(self.access):
            log.warning("curve.nobody_allowed", file=str(self._list.path), mend="cpe keys allow")

    def close(self) -> None:
        """Stop being asked: whoever connects now is refused."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    async def answer(self) -> None:
        """Answer until cancelled."""
        if self._authenticator is None:
            return
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        socket = self._authenticator.zap_socket
        fd = int(socket.getsockopt(zmq.FD))
        loop.add_reader(fd, asked.set)
        try:
            while True:
                while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    question = socket.recv_multipart(zmq.NOBLOCK)
                    self._asked_from = b"".join(question[_ADDRESS : _ADDRESS + 1]).decode(errors="replace")
                    await self._authenticator.handle_zap_message(question)
                    await asyncio.sleep(0)  # strangers who knock all the time leave time for the others
                asked.clear()
                await asked.wait()
        finally:
            loop.remove_reader(fd)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a key may connect; the authenticator asks."""
        public, now = key.decode(), time.monotonic()
        allowed = public in self.access
        if allowed and self._connected.take(_EVERYBODY, now):
            log.info("client.connected", client=self.access.name(public), address=self._asked_from)
        if not allowed:
            self._on_refused()
            if self._refused.take(_EVERYBODY, now):
                log.warning("client.refused", key=public, address=self._asked_from, mend="cpe keys allow")
        return allowed

    async def look(self) -> bool:
        """Look at the list; whether another one is in effect now.

        One that cannot be used, or that cannot be read in time, leaves the last one in effect, and is `trouble`.
        """
        try:
            clients = await self._patience.do(self._list.read_if_changed)
        except ConfigError as error:
            self._complain(error.message)
            return False
        except TimeoutError:
            self._list = self._list.afresh()  # the other one belongs to a thread that hangs
            self._complain(
                f"{self._list.path} could not be read within {self._patience.seconds:g} s, so nobody knows whether keys"
                " were revoked since; does its file system answer?"
            )
            return False
        if clients is None:
            return False
        self.trouble = ""
        self.access.replace(clients)
        log.info("curve.list_read", allowed=sorted(client.name for client in clients.values()))
        return True

    def _complain(self, reason: str) -> None:
        trouble = f"the list of allowed keys is not used, and the one before it still is: {reason}"
        if trouble != self.trouble:
            log.error("curve.list_refused", reason=reason)
        self.trouble = trouble

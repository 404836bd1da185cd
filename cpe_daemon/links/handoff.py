"""File descriptors from the daemon to a process of the same host, over a unix socket.

The daemon offers a descriptor under a random token, good once, which the other side learnt over its ZeroMQ link. The
connection that fetched it is kept open: it is a *tether*. When the process dies, however it dies, the kernel closes its
end, and the daemon knows within a moment, without waiting for heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cpe_daemon.errors import ConfigError, PeerLostError, ProtocolError, ResourceError

# Not structlog: trainers and engines import this module for `claim`, and their environments do not have it.
log = logging.getLogger(__name__)

_GREETING: Final = b"cpe-fd1:"
_TOKEN_BYTES: Final = 32
_REQUEST_BYTES: Final = len(_GREETING) + _TOKEN_BYTES
_REPLY: Final = b"\x01"
_CLAIM_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.5
_SOCKET_MODE: Final = 0o660
_MAX_CLAIMING: Final = 64


@dataclass(slots=True)
class _Offer:
    fd: int
    on_gone: Callable[[], None]


class HandoffServer:
    """The daemon's half. Lives on the event loop; every connection is a task of ``tasks``.

    Args:
        path: of the unix socket; created with mode 0660.
        tasks: the TaskGroup that owns the connections.
        on_protocol_error: called for each connection that asks for something it was not offered.
    """

    def __init__(
        self,
        path: Path,
        tasks: asyncio.TaskGroup,
        *,
        on_protocol_error: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.path = path
        self._tasks = tasks
        self._on_protocol_error = on_protocol_error
        self.claims = 0
        """Descriptors handed over so far."""
        self._offers: dict[bytes, _Offer] = {}
        self._claiming = asyncio.Semaphore(_MAX_CLAIMING)
        self._running: set[asyncio.Task[None]] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(str(path))
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"cannot listen on {path}: {error}") from None
        os.chmod(path, _SOCKET_MODE)
        self._socket.listen(128)

    def start(self) -> None:
        """Begin to accept."""
        self._spawn(self._accept())

    def close(self) -> None:
        """Stop accepting, cut every tether, and remove the socket's file."""
        for task in self._running:
            task.cancel()
        for offer in self._offers.values():
            os.close(offer.fd)
        self._offers.clear()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def tie(self, on_gone: Callable[[], None]) -> bytes:
        """Offer nothing but a tether, once; ``on_gone`` is called when the process that took it lets go or dies.

        Raises:
            ResourceError: no descriptor is left.
        """
        try:
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ResourceError(f"no tether can be made: {error}; raise the limit of open files") from None
        try:
            return self.offer(nothing, on_gone)
        finally:
            os.close(nothing)

    def offer(self, fd: int, on_gone: Callable[[], None] = lambda: None) -> bytes:
        """Offer a duplicate of ``fd``, once; ``on_gone`` is called when the process that took it lets go or dies.

        Raises:
            ResourceError: no descriptor is left.
        """
        token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            self._offers[token] = _Offer(os.dup(fd), on_gone)
        except OSError as error:
            raise ResourceError(f"memory cannot be handed over: {error}; raise the limit of open files") from None
        return token

    def withdraw(self, token: bytes) -> None:
        """Take an offer back; does nothing if it was taken already."""
        offer = self._offers.pop(token, None)
        if offer is not None:
            os.close(offer.fd)

    def _spawn(self, work: Coroutine[Any, Any, None], after: Callable[[], None] = lambda: None) -> None:
        """Run ``work``, and then ``after``, even if it is cancelled before it has begun."""

        def done(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            after()

        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(done)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._claiming.acquire()
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError as error:  # out of descriptors: those who wait are served when some come free
                self._claiming.release()
                log.warning("handoff.accept_failed: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._spawn(self._serve(connection), connection.close)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            offer = await self._claimed(connection)
        except (ProtocolError, TimeoutError, OSError) as error:
            self._on_protocol_error("handoff")
            log.debug("handoff.refused", extra={"reason": str(error)})
            return
        finally:
            self._claiming.release()
        try:
            await self._tether(connection, offer)
        except OSError as error:
            log.debug("handoff.cut", extra={"reason": str(error)})
        finally:
            connection.close()
            offer.on_gone()

    async def _claimed(self, connection: socket.socket) -> _Offer:
        """Read the token, and return what was offered under it."""
        loop = asyncio.get_running_loop()
        request = b""
        async with asyncio.timeout(_CLAIM_SECONDS):
            while len(request) < _REQUEST_BYTES:
                received = await loop.sock_recv(connection, _REQUEST_BYTES - len(request))
                if not received:
                    raise ProtocolError("hand-off connection ended before its token")
                request += received
                if not request.startswith(_GREETING[: len(request)]):
                    raise ProtocolError("not a hand-off request")
        offer = self._offers.pop(request[len(_GREETING) :], None)
        if offer is None:
            raise ProtocolError("hand-off token unknown or used")
        return offer

    async def _tether(self, connection: socket.socket, offer: _Offer) -> None:
        """Hand the descriptor over, and return when the process that has it now lets go or dies."""
        loop = asyncio.get_running_loop()
        try:
            socket.send_fds(connection, [_REPLY], [offer.fd])
            self.claims += 1
        finally:
            os.close(offer.fd)
        while await loop.sock_recv(connection, 64):
            continue  # nothing is said on a tether; only its end means something


class Tether:
    """The client's end of a hand-off: keep it open as long as the descriptor's purpose lives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection

    @property
    def cut(self) -> bool:
        """Whether the daemon's end is closed: it ended, or let go of this process. Costs one system call."""
        try:
            return not self._connection.recv(64)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Let go; the daemon notices."""
        self._connection.close()


def claim(path: str, token: bytes, timeout: float = _CLAIM_SECONDS) -> tuple[int, Tether]:
    """Fetch the descriptor offered under ``token``. Blocking; for a thread of a trainer or an engine.

    Returns:
        The descriptor, now the caller's to close, and the tether.

    Raises:
        PeerLostError: the daemon is not there, does not know the token, or does not answer in ``timeout`` seconds.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # The kernel's own deadlines: with Python's, connecting fails at once while others queue before the daemon.
    limit = struct.pack("@ll", *divmod(max(1, int(timeout * 1_000_000)), 1_000_000))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)
    try:
        connection.connect(path)
        connection.sendall(_GREETING + token)
        reply, fds, _, _ = socket.recv_fds(connection, len(_REPLY), 1)
        if reply != _REPLY or len(fds) != 1:
            raise PeerLostError(f"the daemon at {path} did not hand its memory over; was it restarted?")
    except BlockingIOError:
        connection.close()
        raise PeerLostError(f"the daemon at {path} handed no memory over within {timeout:g} s") from None
    except OSError as error:
        connection.close()
        raise PeerLostError(f"cannot fetch memory from the daemon at {path}: {error}") from error
    except PeerLostError:
        connection.close()
        raise
    os.set_inheritable(fds[0], False)
    return fds[0], Tether(connection)

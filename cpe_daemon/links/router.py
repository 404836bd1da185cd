"""The daemon's side of ZeroMQ: a ROUTER on the event loop that hands decoded messages to handlers.

It refuses whatever is not a message, comes too often, or lacks the role that it takes, and counts it. It never waits
for a peer: a reply that does not fit into the peer's queue is dropped, and the caller is told. Handlers are plain
functions; what takes time they hand to a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Final

import structlog
import zmq

from cpe_daemon.core.rates import Rates
from cpe_daemon.errors import AccessError, BusyError, ConfigError, CpeError, ProtocolError, ResourceError
from cpe_daemon.links.access import Access
from cpe_daemon.links.address import cannot_listen
from cpe_daemon.links.allowed import Client
from cpe_daemon.links.curve import secure
from cpe_daemon.links.frames import receive_frames, send_frames
from cpe_daemon.links.identity import is_keyed, key_prefix
from cpe_daemon.links.keys import KeyPair
from cpe_daemon.wire.codec import Codec, encode
from cpe_daemon.wire.messages import ErrorReply, Message
from cpe_daemon.wire.reports import ErrorInfo

log = structlog.get_logger(__name__)

Handler = Callable[[bytes, Any, Sequence[memoryview]], None]
"""Called as handler(peer, message, bulk frames); raises `CpeError` to refuse, which the peer is told."""

_TURN: Final = 64
"""Messages taken in one go before other tasks of the loop get their turn."""

_DISCARDS: Final = 1024
"""Frames thrown away in one go."""

_TELL_SECONDS: Final = 1.0
"""A peer that speaks too often is told so once in as long."""

_WARNED_PER_SECOND: Final = 0.1
_WARNED_BURST: Final = 5
"""Refusals in the log, of each client: that there were some, and what it tried, but not all of them."""

_KEEPALIVE: Final = (
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 10),
    (zmq.TCP_KEEPALIVE_INTVL, 5),
    (zmq.TCP_KEEPALIVE_CNT, 2),
    (zmq.TCP_MAXRT, 20_000),
)
"""Hosts that vanish are noticed by the kernel, and not by libzmq's heartbeats: libzmq (4.3.5, its issues 4364 and 4767)
aborts the process if one of its timers comes due for a peer that has filled its queue and left."""

_SOCKET_MODE: Final = 0o660
_BACKLOG: Final = 1024
_LINGER_MILLISECONDS: Final = 500


class Router:
    """One ROUTER socket, several endpoints, one conversation.

    Args:
        name: for logs and metrics.
        context: the ZeroMQ context; stays the caller's.
        accepts: union of the message types taken.
        handlers: by message type; a type without one is refused.
        max_frame_bytes: larger frames cut the connection before they are held in memory.
        most_frames: of a message, its header among them; more are thrown away as they come, without a list of them.
        queue: messages of a peer that may wait to be taken; the rest waits in its own memory.
        outgoing: messages that may wait for a peer to take them, more are dropped; as ``queue`` if None.
        handshake_seconds: a connection that has not introduced itself in as long is cut.
        pair: the daemon's keys: every endpoint takes clients with keys only, by CURVE, as soon as ``access`` lets
            them in; None for endpoints of this host, whose files say who may connect.
        access: the rights of those clients; goes with ``pair``.
        rates: how often each peer may speak; None for no limit.
        on_protocol_error: called with the router's name for each message that is refused for one of these reasons.
    """

    def __init__(
        self,
        name: str,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        accepts: UnionType,
        handlers: Mapping[type[Message], Handler],
        max_frame_bytes: int,
        most_frames: int = 2,
        queue: int = 1000,
        outgoing: int | None = None,
        handshake_seconds: float = 10.0,
        pair: KeyPair | None = None,
        access: Access | None = None,
        rates: Rates | None = None,
        on_protocol_error: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.name = name
        self._codec = Codec(accepts)
        self._handlers = handlers
        self._access = access
        self._rates = rates
        self._tellings = Rates(1 / _TELL_SECONDS, 1)
        self._warnings = Rates(_WARNED_PER_SECOND, _WARNED_BURST)
        self._most_frames = most_frames
        self._discarding = False
        self._on_protocol_error = on_protocol_error
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._files: dict[Path, tuple[int, int] | None] = {}
        self._socket = context.socket(zmq.ROUTER)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, max_frame_bytes),
            (zmq.RCVHWM, queue),
            (zmq.SNDHWM, queue if outgoing is None else outgoing),
            *_KEEPALIVE,
            (zmq.HANDSHAKE_IVL, int(handshake_seconds * 1000)),
            (zmq.BACKLOG, _BACKLOG),
        ):
            self._socket.setsockopt(option, value)
        if pair is not None:
            secure(self._socket, pair)

    @property
    def unknown_fields(self) -> int:
        """Fields that peers sent and that this release ignored."""
        return self._codec.unknown_fields

    def bind(self, endpoint: str) -> str:
        """Listen on ``endpoint`` and return it as bound (a port of 0 is replaced by the one chosen).

        Raises:
            ConfigError: the endpoint cannot be bound; names it.
            ResourceError: it cannot be bound now: somebody has it, or the host lacks the address.
        """
        path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
        if path is not None:
            _check_free(path)
        umask = os.umask(0o777 & ~_SOCKET_MODE)  # for libzmq, which makes the file, and asks for no mode
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise cannot_listen(endpoint, error.errno or 0, str(error)) from None
        finally:
            os.umask(umask)
        if path is not None:
            os.chmod(path, _SOCKET_MODE)
            self._files[path] = _identity(path)
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def start(self) -> None:
        """Begin to take messages, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._schedule)
        self._schedule()

    def close(self) -> None:
        """Stop, and remove the socket files.

        What was sent last still goes out while the context is terminated, to peers that take it soon: a trainer shall
        hear that its version is live, even if the daemon stops right then.
        """
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None
        self._socket.close(linger=_LINGER_MILLISECONDS)
        for path, made in self._files.items():
            if _identity(path) == made:  # or else it is another daemon's by now
                path.unlink(missing_ok=True)

    def send(self, peer: bytes, message: Message, *frames: bytes | memoryview) -> bool:
        """Send without waiting; False if the peer is gone or its queue is full."""
        return self.send_encoded(peer, encode(message), *frames)

    def send_encoded(self, peer: bytes, header: bytes, *frames: bytes | memoryview) -> bool:
        """`send` for a header that goes to several peers and is encoded once."""
        if self._socket.closed:
            return False
        try:
            send_frames(self._socket, (peer, header, *frames))
        except (zmq.Again, zmq.ZMQError):
            return False
        finally:
            self._schedule()  # a send may consume the edge that announces waiting messages
        return True

    def _schedule(self) -> None:
        """Drain soon, once: however often it is asked for, a flood of messages gets one turn of the loop's."""
        if self._loop is not None and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        now = time.monotonic()
        for _ in range(_TURN):
            if self._loop is None:
                return
            try:
                if self._discarding:
                    self._discard()
                    continue
                frames = self._receive()
            except zmq.Again:
                return
            self._take(frames, now)
        self._schedule()

    def _receive(self) -> list[zmq.Frame]:
        """Return the peer's routing id and the frames of its next message, of which the last may be one too many."""
        frames = receive_frames(self._socket, 2 + self._most_frames)
        self._discarding = bool(frames[-1].more)
        return frames

    def _discard(self) -> None:
        """Throw away what is left of a message with too many frames, a turn's worth at a time."""
        for _ in range(_DISCARDS):
            if not self._socket.recv(zmq.NOBLOCK, copy=False).more:
                self._discarding = False
                return

    def _take(self, frames: Sequence[zmq.Frame], now: float) -> None:
        """Decode and hand over one message; tell the peer if it is refused."""
        peer, kind, stream = frames[0].bytes, "", 0
        if self._rates is not None and not self._rates.take(peer, now):
            self._hush(peer, now)
            return
        try:
            client = self._client(peer, frames[0])
            if not 1 < len(frames) <= 1 + self._most_frames:
                raise ProtocolError(f"a message has 1 to {self._most_frames} frames")
            header, *bulk = (memoryview(frame.buffer) for frame in frames[1:])
            message = self._codec.decode(header)
            kind, stream = type(message).__name__, getattr(message, "stream", 0)
            if client is not None and self._access is not None:
                self._access.check(client, type(message))
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{kind} is not accepted here")
            handler(peer, message, bulk)
        except (ProtocolError, AccessError) as error:
            self._on_protocol_error(self.name)
            self._say_refused(peer, kind, error, now)
            self.refuse(peer, error, stream)
        except CpeError as error:
            self.refuse(peer, error, stream)
        except Exception as error:  # task boundary: a bug met by one peer's message must not keep the others waiting
            log.exception("message.failed", socket=self.name)
            self.refuse(peer, CpeError(f"{type(error).__name__} in the daemon, whose log has more"), stream)

    def _client(self, peer: bytes, frame: zmq.Frame) -> Client | None:
        """Who says this; None is anybody who may connect here.

        Raises:
            AccessError: it comes with no key that is allowed, or under another one's routing id.
        """
        if self._access is not None:
            try:
                public = str(frame.get("User-Id"))
            except zmq.ZMQError:
                public = None
            return self._access.client(peer, public)
        if is_keyed(peer):
            raise AccessError("this routing id is for clients with keys, which connect over tcp")
        return None

    def _say_refused(self, peer: bytes, kind: str, error: CpeError, now: float) -> None:
        """Log a refusal: what a client with a key may not do concerns the operator, what is no message hardly."""
        say, client = log.debug, ""
        if self._access is not None and is_keyed(peer) and isinstance(error, AccessError):
            client = self._access.name_of(peer)
            if self._warnings.take(key_prefix(peer), now):
                say = log.warning
        say("message.refused", socket=self.name, client=client, message=kind, reason=error.message)

    def _hush(self, peer: bytes, now: float) -> None:
        """Refuse what came too soon after too much else."""
        self._on_protocol_error(self.name)
        if self._tellings.take(peer, now):
            error = BusyError("more messages a second than ingest.messages_per_second allows: some are not taken")
            log.warning("peer.hushed", socket=self.name, reason=error.message)
            self.refuse(peer, error)

    def refuse(self, peer: bytes, error: CpeError, stream: int = 0) -> None:
        """Tell a peer why something of it was refused."""
        self.send(peer, ErrorReply(ErrorInfo(error.code, error.message), stream))


def _check_free(path: Path) -> None:
    """Refuse the file of a socket at which somebody listens, and one that is no socket: libzmq would replace either.

    Raises:
        ConfigError: it is no socket.
        ResourceError: somebody listens.
    """
    with contextlib.suppress(FileNotFoundError):
        if not path.is_socket() and path.lstat():
            raise ConfigError(f"cannot listen on ipc://{path}: that file is there, and it is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as asking:
        try:
            asking.connect(str(path))
        except BlockingIOError:  # so many want to, that it has to wait
            pass
        except OSError:  # there is none, or it was left behind
            return
    raise ResourceError(f"cannot listen on ipc://{path}: another process does; stop that, or use another path")


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell one file by a name from the next."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino

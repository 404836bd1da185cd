"""The way in for trainers and operators: a socket for this host, and one that takes keys.

They are two sockets, so that whom to trust follows from where a message came in, and from nothing that it carries. To
everybody behind them they are one: a routing id tells which of them its peer is at.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import structlog
import zmq

from cpe_daemon.config import Config
from cpe_daemon.core.rates import Rates
from cpe_daemon.daemon.operations import Operations
from cpe_daemon.errors import AccessError
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.address import check_address
from cpe_daemon.links.curve import Curve
from cpe_daemon.links.identity import is_keyed
from cpe_daemon.links.router import Handler, Router
from cpe_daemon.wire.codec import MAX_HEADER_BYTES, encode
from cpe_daemon.wire.messages import (
    MOST_CHUNK_FRAMES,
    FrontMessage,
    Message,
    StatusReply,
    StatusRequest,
    TrainerHello,
)

log = structlog.get_logger(__name__)

_MESSAGES_BESIDE_CREDITS: Final = 16
"""What a client may have on its way besides chunks: heartbeats, parts of manifests, questions."""

_OUTGOING: Final = 256
"""Answers that may wait for a client; enough that one which reads them misses none."""

_DECRYPTING_THREADS: Final = min(4, len(os.sched_getaffinity(0)))
_STATUS_SECONDS: Final = 0.1
_STATUS_BURST: Final = 200
_EVERYBODY: Final = b""
_THIS_HOST: Final = "(local)"


def io_threads(config: Config) -> int:
    """How many of ZeroMQ's threads carry bytes: one is enough, but for those that also have to decrypt them."""
    return _DECRYPTING_THREADS if _keyed(config) else 1


class Front:
    """Both sockets. Belongs to the event loop.

    Args:
        config: the daemon's settings.
        context: of ZeroMQ; stays the caller's.
        handlers: by message type, but for `StatusRequest`.
        status: makes what that is answered with.
        trainers: lose their links when their keys are revoked.
        operations: lose the pushes that wait for their turn when the keys of those who asked for them are.
        on_protocol_error: called with a socket's name for each message, and each key, that is refused.
    """

    def __init__(
        self,
        config: Config,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        handlers: Mapping[type[Message], Handler],
        status: Callable[[], dict[str, Any]],
        trainers: Trainers,
        operations: Operations,
        on_protocol_error: Callable[[str], None],
    ) -> None:
        self._config = config
        self._context = context
        self._handlers: dict[type[Message], Handler] = {**handlers, StatusRequest: self._on_status}
        self._status = _Paced(status)
        self._trainers = trainers
        self._operations = operations
        self._on_protocol_error = on_protocol_error
        self._curve: Curve | None = None
        ingest = config.ingest
        self._local = self._router(
            "front",
            frame_bytes=max(ingest.chunk_bytes, ingest.landing_chunk_bytes),
            credit=max(ingest.credits, ingest.landing_credits),
        )
        self._remote: Router | None = None

    @property
    def routers(self) -> tuple[Router, ...]:
        """The sockets that there are."""
        return (self._local,) if self._remote is None else (self._local, self._remote)

    def warnings(self) -> list[str]:
        """What an operator should know of who may come in, each in a line."""
        lines = []
        if self._config.ingest.insecure:
            lines += [
                f"{e} lets whoever reaches it replace the weights: ingest.insecure is set" for e in self._over_tcp
            ]
        if self._curve is not None and self._curve.trouble:
            lines.append(self._curve.trouble)
        return lines

    def check_addresses(self) -> None:
        """Refuse tcp endpoints that `open` could not bind, while nothing that takes long has begun.

        Raises:
            ConfigError: one never can be.
            ResourceError: one cannot be now; names it and the mend.
        """
        for endpoint in self._over_tcp:
            check_address(endpoint)

    async def load_keys(self) -> None:
        """Read the keys, if any endpoint takes them.

        Raises:
            ConfigError: one cannot be used; says what to do.
        """
        if _keyed(self._config):
            self._curve = Curve(self._config.security.keys_dir, on_refused=lambda: self._on_protocol_error("handshake"))
            await asyncio.to_thread(self._curve.load)

    def open(self, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> list[str]:
        """Listen, and return the endpoints as bound.

        Args:
            spawn: begins what runs as long as the daemon does.

        Raises:
            ConfigError: an endpoint cannot be bound.
        """
        ingest = self._config.ingest
        if self._curve is not None:
            self._curve.open(self._context)
            spawn(self._curve.answer())
            spawn(self._follow_keys(self._curve))
            self._remote = self._router(
                "remote", frame_bytes=ingest.chunk_bytes, credit=ingest.credits, curve=self._curve
            )
        for warning in self.warnings():
            log.warning("front.insecure", warning=warning, mend="cpe keys new --daemon, and ingest.insecure: false")
        bound = []
        for endpoint in self._config.front_endpoints:
            remote = self._remote if endpoint in self._over_tcp else None
            bound.append((remote or self._local).bind(endpoint))
        return bound

    def start(self) -> None:
        """Begin to take messages."""
        for router in self.routers:
            router.start()

    def close(self) -> None:
        """Stop, and remove the socket files; as `Router.close`."""
        for router in self.routers:
            router.close()
        if self._curve is not None:
            self._curve.close()

    def send(self, peer: bytes, message: Message, *frames: bytes | memoryview) -> bool:
        """Send without waiting; False if the peer is gone or its queue is full."""
        return self._router_of(peer).send(peer, message, *frames)

    def client(self, peer: bytes) -> str:
        """Return what a peer is called in the log: its key's name, or where it is."""
        return self._curve.access.name_of(peer) if self._curve is not None and is_keyed(peer) else _THIS_HOST

    def _router_of(self, peer: bytes) -> Router:
        return self._remote if self._remote is not None and is_keyed(peer) else self._local

    @property
    def _over_tcp(self) -> list[str]:
        return [endpoint for endpoint in self._config.ingest.listen if endpoint.startswith("tcp://")]

    def _router(self, name: str, *, frame_bytes: int, credit: int, curve: Curve | None = None) -> Router:
        per_second = self._config.ingest.messages_per_second
        return Router(
            name,
            self._context,
            accepts=FrontMessage,
            handlers=self._handlers,
            max_frame_bytes=max(MAX_HEADER_BYTES, frame_bytes),
            most_frames=1 + MOST_CHUNK_FRAMES,
            queue=credit + _MESSAGES_BESIDE_CREDITS,
            outgoing=_OUTGOING,
            handshake_seconds=self._config.deadlines.hello_seconds,
            pair=curve.pair if curve else None,
            access=curve.access if curve else None,
            rates=Rates(per_second, burst=per_second),
            on_protocol_error=self._on_protocol_error,
        )

    def _on_status(self, peer: bytes, _: StatusRequest, __: object) -> None:
        self._router_of(peer).send_encoded(peer, self._status.encoded())

    async def _follow_keys(self, curve: Curve) -> None:
        """Look at the list of keys at the heartbeat's pace; who lost a right loses what is under way by it."""
        while True:
            await asyncio.sleep(self._config.deadlines.heartbeat_interval_seconds)
            if await curve.look():
                reason = "its key was revoked, or is no trainer's any more"
                for peer in self._trainers.drop(lambda peer: not curve.access.may(peer, TrainerHello), reason):
                    self._router_of(peer).refuse(peer, AccessError(f"this trainer's session has ended: {reason}"))
                for peer in self._operations.drop_pushes(curve.access.may):
                    error = AccessError(
                        "this push is not waited for: its key was revoked, or lacks the role for it by now"
                    )
                    self._router_of(peer).refuse(peer, error)


def _keyed(config: Config) -> bool:
    """Whether any endpoint takes keys."""
    return not config.ingest.insecure and any(endpoint.startswith("tcp://") for endpoint in config.ingest.listen)


class _Paced:
    """The daemon's status, put together so often only that nobody can keep the daemon busy by asking."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status
        self._rates = Rates(1 / _STATUS_SECONDS, _STATUS_BURST)
        self._encoded = b""

    def encoded(self) -> bytes:
        """The answer; during a flood of questions as old as `_STATUS_SECONDS`."""
        if self._rates.take(_EVERYBODY, time.monotonic()) or not self._encoded:
            self._encoded = encode(StatusReply(self._status()))
        return self._encoded

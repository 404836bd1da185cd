"""The HTTP listener: a few pages that only tell. It knows connections and requests, and not what its pages say.

A connection carries one request and lives some seconds at most, whatever its peer does: sends nothing, or its request
byte by byte, or does not read the answer. Where there is no room for another one, the oldest makes room, so that a
probe gets in however many others are there.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from aiohttp import web
from yarl import URL

from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.observe.tls import Certificate

log = structlog.get_logger(__name__)

MAX_CONNECTIONS: Final = 64
CONNECTION_SECONDS: Final = 10.0
_BACKLOG: Final = 128
_PAUSE_SECONDS: Final = 0.005
"""Between two connections: 200 a second are plenty for probes and scrapers, and cost little of the loop's time."""

_RETRY_SECONDS: Final = 0.5
_LAST_SECONDS: Final = 0.5
_MAX_LINE_BYTES: Final = 2048
_MAX_HEADER_BYTES: Final = 4096
_MAX_HEADERS: Final = 64
_METHODS: Final = ("GET", "HEAD")
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "cpe-daemon"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page says."""

    body: bytes
    content_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[str], Awaitable[Answer]]
"""Called with what the request accepts."""


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    """An answer in JSON, indented for people."""
    body = json.dumps(value, indent=2, default=str).encode() + b"\n"
    return Answer(body, "application/json; charset=utf-8", status, headers)


@dataclass(slots=True, eq=False)
class _Connection:
    """One connection, from its accepting until it is lost."""

    over: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Listener:
    """Listens on one address. Lives on the event loop.

    Args:
        address: IP address and port; port 0 is any free one.
        pages: by path.
        tasks: the TaskGroup that owns the connections.
        certificate: for https; None for http.
        on_protocol_error: called for each request that cannot be understood.

    Raises:
        ConfigError: the address cannot be had; says what to do.
        ResourceError: it cannot be had now.
    """

    def __init__(
        self,
        address: tuple[str, int],
        pages: Mapping[str, Page],
        tasks: asyncio.TaskGroup,
        *,
        certificate: Certificate | None = None,
        on_protocol_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._pages = {"/": self._index, **pages}
        self._tasks = tasks
        self._certificate = certificate
        self._connections: dict[web.RequestHandler, _Connection] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._server = _Server(
            self._handle,
            self._lost,
            access_log=None,
            logger=_Refusals(on_protocol_error),
            lingering_time=0.0,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            max_headers=_MAX_HEADERS,
        )
        self._socket = _listen(*address)
        host, port = self._socket.getsockname()[:2]
        self.url = f"{'https' if certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        """Where it listens."""

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = self._tasks.create_task(self._accept())

    async def close(self) -> None:
        """Stop listening, and cut every connection."""
        if self._accepting is not None:
            self._accepting.cancel()
        self._socket.close()
        tasks = [connection.task for connection in self._connections.values() if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.shutdown(_LAST_SECONDS)

    # --- connections -------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._socket)
            except OSError as error:  # out of descriptors: those who wait are served when some come free
                log.warning("http.accept_failed", error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._make_room()
            self._take(accepted)
            await asyncio.sleep(_PAUSE_SECONDS)

    def _take(self, accepted: socket.socket) -> None:
        """Serve a connection, and let go of it even if that is cancelled before it has begun."""
        handler, connection = self._server(), _Connection()

        def done(_: asyncio.Task[None]) -> None:
            del self._connections[handler]
            accepted.close()

        self._connections[handler] = connection
        connection.task = self._tasks.create_task(self._serve(accepted, handler, connection))
        connection.task.add_done_callback(done)

    def _make_room(self) -> None:
        """End the oldest connection if there is no room for one more."""
        if len(self._connections) < MAX_CONNECTIONS:
            return
        for connection in self._connections.values():
            if connection.task is not None and not connection.task.cancelling():
                connection.task.cancel()
                return

    async def _serve(self, accepted: socket.socket, handler: web.RequestHandler, connection: _Connection) -> None:
        """One connection's life; ends it when its time is up."""
        transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                terms: dict[str, Any] = {}
                if self._certificate is not None:
                    context = await asyncio.to_thread(self._certificate.context)
                    terms = {"ssl": context, "ssl_handshake_timeout": CONNECTION_SECONDS}
                transport, _ = await loop.connect_accepted_socket(lambda: handler, accepted, **terms)
                await connection.over.wait()
        except (TimeoutError, OSError) as error:
            log.debug("http.cut", reason=repr(error))
        finally:
            if transport is not None:
                transport.abort()

    def _lost(self, handler: web.RequestHandler) -> None:
        connection = self._connections.get(handler)
        if connection is not None:
            connection.over.set()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            answer = await self._answer(request)
        except Exception as error:  # task boundary: a bug behind one page must not take the others away
            log.exception("http.failed", path=request.path)
            answer = as_json({"error": f"{type(error).__name__}; the daemon's log has more"}, 500)
        response = web.Response(
            body=answer.body,
            status=answer.status,
            headers={**_HEADERS, "Content-Type": answer.content_type, **answer.headers},
        )
        response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> Answer:
        if request.method not in _METHODS:
            return as_json({"error": f"{request.method[:20]} is not allowed here"}, 405, Allow=", ".join(_METHODS))
        page = self._pages.get(request.path)
        if page is None:
            return as_json({"error": f"no page {request.path[:200]}", "pages": list(self._pages)}, 404)
        return await page(request.headers.get("Accept", ""))

    async def _index(self, _: str) -> Answer:
        links = "".join(f'<li><a href="{path}">{path}</a></li>\n' for path in self._pages if path != "/")
        page = f"<!doctype html>\n<title>cpe-daemon</title>\n<h1>cpe-daemon</h1>\n<ul>\n{links}</ul>\n"
        return Answer(page.encode(), "text/html; charset=utf-8")


class _Handler(web.RequestHandler):
    """aiohttp's half of a connection, whose parser may choke without harm."""

    def data_received(self, data: bytes) -> None:
        """Called by the transport, which would log a traceback of whatever is raised here."""
        try:
            super().data_received(data)
        except Exception as error:  # task boundary: what a stranger sent concerns this connection alone
            self.logger.error("%r", error)
            self.force_close()


class _Server(web.Server):
    """aiohttp's, which says when a connection is over."""

    def __init__(
        self,
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        lost: Callable[[web.RequestHandler], None],
        **terms: Any,
    ) -> None:
        super().__init__(handle, request_factory=self._made, handler_cancellation=True)  # whoever is gone asks no more
        self._lost = lost
        self._terms = terms

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Handler(self, loop=asyncio.get_running_loop(), **self._terms)

    def _made(
        self, message: Any, payload: Any, protocol: web.RequestHandler, writer: Any, task: asyncio.Task[None]
    ) -> web.BaseRequest:
        """A request. aiohttp's parser lets a CONNECT through that has no target, and its own requests choke on that."""
        if message.url is None:
            message = message._replace(url=URL("/"))
        return web.BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Called by aiohttp."""
        super().connection_lost(handler, exc)
        self._lost(handler)


class _Refusals(logging.Logger):
    """What aiohttp would log with a traceback, of requests that are none: anybody could fill the disk with it."""

    def __init__(self, on_protocol_error: Callable[[], None]) -> None:
        super().__init__("cpe_daemon.observe.http.refused")
        self._on_protocol_error = on_protocol_error

    def handle(self, record: logging.LogRecord) -> None:
        """Count it, whatever it is."""
        self._on_protocol_error()
        error = record.exc_info[1] if record.exc_info else None
        log.debug("http.refused", reason=repr(error) if error is not None else record.getMessage())


def _listen(host: str, port: int) -> socket.socket:
    """Listen.

    Raises:
        ConfigError: the address cannot be had.
        ResourceError: it cannot be had now.
    """
    written = f"{f'[{host}]' if ':' in host else host}:{port}"
    try:
        made = socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=_BACKLOG,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        mend = {
            errno.EADDRINUSE: 'another process has it; stop that, or set http.listen to another port, or to ""',
            errno.EADDRNOTAVAIL: "no interface of this host has that address",
            errno.EACCES: "ports below 1024 are for root; use another one",
        }.get(error.errno or 0, "set http.listen to another address")
        kind = ResourceError if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) else ConfigError
        raise kind(f"cannot listen on {written} (http.listen): {os.strerror(error.errno or 0)}: {mend}") from None
    made.setblocking(False)
    return made

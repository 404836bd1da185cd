"""The daemon's way to a server's own HTTP API: over TCP, TLS or a Unix socket, each call with a deadline."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Awaitable, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp

from cpe_daemon.core.driver import Workers
from cpe_daemon.errors import DeadlineError, EngineError, PeerLostError

_MOST_TEXT: Final = 300
_IDLE_SECONDS: Final = 2.0
"""How long a connection that nobody uses is kept: for less than a server does, which may be 5 s."""
_FORBIDDEN: Final = (401, 403)

T = TypeVar("T")


class ServerApi:
    """Calls one server. Settings that hold for all servers of a kind are in the daemon's environment.

    Args:
        engine: its name, for messages.
        workers: of the engine; they know where the server is, which may change.
        kind: of engine, as ``cpe engine add`` has it.
        keys: variables of the environment that may have the server's key; the first that is set counts.
        ca_file: the variable that names a file of authorities to trust behind ``https://``.
    """

    def __init__(self, engine: str, workers: Workers, *, kind: str, keys: tuple[str, ...], ca_file: str) -> None:
        self._engine = engine
        self._workers = workers
        self._kind = kind
        self._keys = keys
        self._ca_file = ca_file
        self._kept: aiohttp.ClientSession | None = None
        self._terms: tuple[str, str, str] = ("", "", "")
        """Where the server was, and by which key and authorities, when that was made."""

    async def within(self, what: str, seconds: float | None, call: Awaitable[T]) -> T:
        """Await calls to the server, and return what they do.

        Raises:
            PeerLostError: it cannot be reached.
            DeadlineError: it does not answer in time.
            EngineError: it refuses; says why.
        """
        try:
            async with asyncio.timeout(seconds):
                return await call
        except TimeoutError:
            raise DeadlineError(f"engine {self._engine!r}: {what} took longer than {seconds:g} s") from None
        except aiohttp.ClientError as error:
            raise PeerLostError(f"engine {self._engine!r} at {self._workers.url}: {what}: {error}") from None

    async def post(
        self,
        path: str,
        seconds: float | None,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the server, and return what it says; raises as `within` does."""

        async def call() -> Any:
            async with self.session() as session:
                return await self.posted(session, path, path, params=params, body=body)

        return await self.within(path, seconds, call())

    async def posted(
        self,
        session: aiohttp.ClientSession,
        route: str,
        what: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call it within a session; ``what`` is for messages.

        Returns:
            Its answer, if that is JSON; else None.

        Raises:
            EngineError: it refuses; says why.
        """
        async with session.post(route, params=params, json=body) as reply:
            self.check_key(reply)
            if reply.status >= 400:
                raise EngineError(f"engine {self._engine!r}: {what} failed: {await _reason(reply)}")
            try:
                return json.loads(await reply.read())
            except ValueError:
                return None

    def check_key(self, reply: aiohttp.ClientResponse) -> None:
        """Raise if the server wants another key.

        Raises:
            EngineError: it does; says by which variable it is given.
        """
        if reply.status in _FORBIDDEN:
            wrong = "takes no calls with this key" if self._key() else "takes no calls without its key"
            raise EngineError(f"engine {self._engine!r} {wrong}; set {self._keys[0]} for the daemon")

    async def kept(self) -> aiohttp.ClientSession:
        """The session that lasts until `part`, whose calls share connections; made if there is none.

        Raises:
            EngineError: as `session` does.
        """
        terms = (self._workers.url, self._key(), os.environ.get(self._ca_file, ""))
        if self._kept is None or self._terms != terms:
            await self.part()
            self._kept, self._terms = self.session(), terms
        return self._kept

    async def part(self) -> None:
        """Close that session; there may be none."""
        kept, self._kept = self._kept, None
        if kept is not None:
            await kept.close()

    def session(self) -> aiohttp.ClientSession:
        """A session with the server; no call in it has a deadline of its own.

        Raises:
            EngineError: nobody says where the server is.
        """
        url = self._workers.url
        if not url:
            raise EngineError(
                f"nobody says where engine {self._engine!r} is: `cpe engine add {self._engine} --kind {self._kind}"
                " --url URL`, or set CPE_ENGINE_URL for the server"
            )
        parts = urlsplit(url)
        connector: aiohttp.BaseConnector
        if parts.scheme == "unix":
            connector, url = aiohttp.UnixConnector(parts.path, keepalive_timeout=_IDLE_SECONDS), "http://localhost"
        else:
            connector = aiohttp.TCPConnector(ssl=self._authorities(), keepalive_timeout=_IDLE_SECONDS)
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=None)
        return aiohttp.ClientSession(url, connector=connector, headers=headers, timeout=timeout)

    def _key(self) -> str:
        return next((found for name in self._keys if (found := os.environ.get(name))), "")

    def _authorities(self) -> ssl.SSLContext | bool:
        """Who may vouch for servers; True: those that the host trusts."""
        ca_file = os.environ.get(self._ca_file)
        try:
            return ssl.create_default_context(cafile=ca_file) if ca_file else True
        except OSError as error:  # of OpenSSL, too
            raise EngineError(f"{self._ca_file}: {ca_file} cannot be used: {error}") from None


def choice(name: str, among: tuple[str, ...]) -> str:
    """What a variable of the daemon's environment says; the first of ``among`` if it is not set.

    Raises:
        EngineError: it says something else.
    """
    given = os.environ.get(name) or among[0]
    if given not in among:
        raise EngineError(f"{name} is {given!r}; it may be {', '.join(among)}")
    return given


async def _reason(reply: aiohttp.ClientResponse) -> str:
    """What the server says of why it refuses."""
    text = (await reply.text())[:_MOST_TEXT]
    try:
        said = json.loads(text)
    except ValueError:
        said = text
    if isinstance(said, dict):
        said = said.get("error", said.get("message", said))
    return f"{reply.status} {said}"

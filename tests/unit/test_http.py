"""The HTTP listener, by raw sockets: what it answers, and clients that are slow, greedy or talk something else."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import structlog
import uvloop
from structlog.testing import capture_logs

from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.observe import http
from cpe_daemon.observe.http import Answer, Listener, Page, as_json
from cpe_daemon.observe.pages import Paced
from cpe_daemon.observe.tls import Certificate

uvloop.new_event_loop().close()  # libuv keeps a pipe from its first loop on, which is no leak

WAIT_SECONDS = 20.0
LOCAL = ("127.0.0.1", 0)
ACCEPT: list[str] = []


class Response(NamedTuple):
    """An answer, taken apart."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.body)
        return found


async def hello(accept: str) -> Answer:
    ACCEPT.append(accept)
    return Answer(b"hello\n", "text/plain; charset=utf-8")


async def broken(_: str) -> Answer:
    raise ZeroDivisionError("secret")


async def sick(_: str) -> Answer:
    return as_json({"healthy": False}, 503)


PAGES: dict[str, Page] = {"/hello": hello, "/broken": broken, "/sick": sick}


class Served:
    """A listener, and how many requests it refused."""

    def __init__(self, pages: dict[str, Page], tasks: asyncio.TaskGroup, certificate: Certificate | None) -> None:
        self.refused = 0
        self.listener = Listener(LOCAL, pages, tasks, certificate=certificate, on_protocol_error=self._count)
        self.listener.start()
        self.port = int(self.listener.url.rpartition(":")[2])

    def _count(self) -> None:
        self.refused += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> Response:
        """Send bytes, and read until the listener closes; raises ConnectionError if it closes without an answer."""
        reader, writer = await self.connect()
        async with asyncio.timeout(WAIT_SECONDS), closing(writer):
            writer.write(request)
            if received := await reader.read():
                return parsed(received)
        raise ConnectionResetError

    async def get(self, path: str, method: str = "GET") -> Response:
        return await self.ask(f"{method} {path} HTTP/1.1\r\nHost: x\r\nAccept: text/x\r\n\r\n".encode())


def parsed(received: bytes) -> Response:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    return Response(int(status.split()[1]), {name: value for name, _, value in pairs}, body)


@asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a connection, whatever became of it."""
    try:
        yield
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def serving(
    pages: dict[str, Page] | None = None, certificate: Certificate | None = None
) -> AsyncIterator[Served]:
    async with asyncio.TaskGroup() as tasks:
        served = Served(PAGES if pages is None else pages, tasks, certificate)
        try:
            yield served
        finally:
            await served.listener.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 - the listener tells nobody
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def fresh_logs() -> None:
    structlog.reset_defaults()
    ACCEPT.clear()


# --- answers ---------------------------------------------------------------------------------------------------------


async def test_page_is_told_what_is_accepted_and_is_not_to_be_kept(no_leaks: None) -> None:
    async with serving() as served:
        answer = await served.get("/hello")
    assert (answer.status, answer.body) == (200, b"hello\n")
    assert ACCEPT == ["text/x"]
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Server"] == "cpe-daemon"


async def test_head_gets_the_headers_alone() -> None:
    async with serving() as served:
        whole, head = await served.get("/hello"), await served.get("/hello", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == whole.headers["Content-Length"] == "6"


async def test_index_links_every_page() -> None:
    async with serving() as served:
        answer = await served.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    for path in PAGES:
        assert f'href="{path}"' in answer.body.decode()


async def test_page_may_answer_that_something_is_wrong() -> None:
    async with serving() as served:
        answer = await served.get("/sick")
    assert (answer.status, answer.json) == (503, {"healthy": False})


@pytest.mark.parametrize(
    "path", ["/nothing", "/hello/", "//hello", "/%2e%2e/etc/passwd", "/hello%00", "/" + "x" * 1500]
)
async def test_unknown_page_is_an_error_that_names_those_there_are(path: str) -> None:
    async with serving() as served:
        answer = await served.get(path)
    assert answer.status == 404
    assert answer.json["pages"] == ["/", *PAGES]
    assert answer.headers["Content-Type"].startswith("application/json")
    assert len(answer.body) < 1000


async def test_query_does_not_matter() -> None:
    async with serving() as served:
        assert (await served.get("/hello?name[]=x&y")).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
async def test_nothing_but_get_and_head_is_allowed(method: str) -> None:
    async with serving() as served:
        answer = await served.get("/hello", method)
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"
        assert answer.json == {"error": f"{method} is not allowed here"}
        assert not ACCEPT


@pytest.mark.parametrize("target", ["", "*", "x", "x:1", "//:x", "/hello"])
async def test_connect_is_refused_whatever_to(target: str, no_leaks: None) -> None:
    """aiohttp's parser takes one without a target, and makes no request of it."""
    async with serving() as served:
        version = " HTTP/1.1" if target else " "
        with suppress(ConnectionError):
            answer = await served.ask(f"CONNECT {target}{version}\r\nHost: x\r\n\r\n".encode())
            assert answer.status in {400, 405}


async def test_bug_behind_a_page_is_logged_and_told_without_its_secrets() -> None:
    async with serving() as served:
        with capture_logs() as logs:
            answer = await served.get("/broken")
        assert (await served.get("/hello")).status == 200
    assert (answer.status, answer.json) == (500, {"error": "ZeroDivisionError; the daemon's log has more"})
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["http.failed"]


async def test_requests_are_not_logged() -> None:
    async with serving() as served:
        with capture_logs() as logs:
            await served.get("/hello")
            await served.get("/nothing")
    assert [entry for entry in logs if entry["log_level"] != "debug"] == []


# --- clients that misbehave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"hello\r\n\r\n",
        b"GET /hello HTTP/9.9\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /hello HTTP/1.1\r\n" + b"".join(b"X%d: x\r\n" % n for n in range(10_000)) + b"\r\n",
    ],
    ids=[
        "tls",
        "words",
        "http 9.9",
        "header",
        "length",
        "smuggling",
        "url",
        "long line",
        "long header",
        "many headers",
    ],
)
async def test_what_is_no_request_is_refused_counted_and_not_logged(request_bytes: bytes, no_leaks: None) -> None:
    async with serving() as served:
        with capture_logs() as logs:
            try:
                answer = await served.ask(request_bytes)
            except OSError:  # it closed while more was on its way
                answer = None
        assert answer is None or answer.status == 400
        await until(lambda: served.refused == 1)
        assert [entry for entry in logs if entry["log_level"] != "debug"] == []
        assert not ACCEPT
        assert (await served.get("/hello")).status == 200


async def test_connection_carries_one_request() -> None:
    async with serving() as served:
        answer = await served.ask(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
    assert (answer.status, answer.body) == (200, b"hello\n")
    assert len(ACCEPT) == 1


async def test_body_of_a_request_is_not_waited_for() -> None:
    async with serving() as served:
        answer = await served.ask(b"GET /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nabc")
    assert answer.status == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hello HT", b"GET /hello HTTP/1.1\r\nX: y"], ids=["nothing", "part", "more"]
)
async def test_client_that_does_not_finish_its_request_is_cut(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.2)
    async with serving() as served:
        reader, writer = await served.connect()
        async with asyncio.timeout(WAIT_SECONDS), closing(writer):
            writer.write(sent)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)


async def test_client_that_sends_byte_by_byte_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.3)
    async with serving() as served:
        reader, writer = await served.connect()

        async def drip() -> None:
            writer.write(b"GET /hello HTTP/1.1\r\n")
            while True:
                writer.write(b"X")
                await writer.drain()
                await asyncio.sleep(0.01)

        async with asyncio.timeout(WAIT_SECONDS), closing(writer):
            dripping = asyncio.create_task(drip())
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            dripping.cancel()
            await asyncio.wait([dripping])


async def test_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.3)

    asked = asyncio.Event()

    async def large(_: str) -> Answer:
        asked.set()
        return Answer(bytes(64 << 20), "application/octet-stream")

    async with serving({"/large": large}) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(WAIT_SECONDS):
                await asked.wait()
            await until(lambda: not served.listener._connections)


async def test_page_that_hangs_ends_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.2)

    async def hang(_: str) -> Answer:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with serving({"/hang": hang}) as served:
        reader, writer = await served.connect()
        async with asyncio.timeout(WAIT_SECONDS), closing(writer):
            writer.write(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)


async def test_oldest_silent_connection_makes_room(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 4)
    async with serving() as served:
        silent = [await served.connect() for _ in range(4)]
        await until(lambda: len(served.listener._connections) == 4)
        assert (await served.get("/hello")).status == 200
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await silent[0][0].readexactly(1)
            silent[3][1].write(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert parsed(await silent[3][0].read()).status == 200
        for _, writer in silent:
            async with closing(writer):
                pass


async def test_oldest_makes_room_though_it_has_asked(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    """Or else those who wait for a slow page would keep probes out."""
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)
    go, asked, gone = asyncio.Event(), 0, 0

    async def slow(_: str) -> Answer:
        nonlocal asked, gone
        asked += 1
        try:
            await go.wait()
        except asyncio.CancelledError:
            gone += 1
            raise
        return Answer(b"at last", "text/plain")

    async with serving(PAGES | {"/slow": slow}) as served:
        waiting = [asyncio.create_task(served.get("/slow"))]
        await until(lambda: asked == 1)
        waiting.append(asyncio.create_task(served.get("/slow")))
        await until(lambda: asked == 2)
        assert (await served.get("/hello")).status == 200
        with pytest.raises(ConnectionError):
            await waiting[0]
        assert gone == 1
        go.set()
        assert (await waiting[1]).body == b"at last"


async def test_probe_is_answered_while_a_crowd_asks_for_a_slow_page(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """More clients than there is room for, each of which asks again as soon as it is cut off."""
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 8)
    over = asyncio.Event()

    async def slow(_: str) -> Answer:
        await over.wait()
        return Answer(b"", "text/plain")

    async def ask_on() -> None:
        while not over.is_set():
            with suppress(OSError):
                await served.get("/slow")

    async with serving(PAGES | {"/slow": Paced(slow, 0.05)}) as served, asyncio.TaskGroup() as crowd:
        for _ in range(12):
            crowd.create_task(ask_on())
        await until(lambda: len(served.listener._connections) == 8)
        answers = [(await served.get("/hello")).status for _ in range(10)]
        over.set()
    assert answers == [200] * 10


async def test_flood_of_connections_leaves_it_serving(no_leaks: None) -> None:
    async with serving() as served:
        answers = await asyncio.gather(*(served.get("/hello") for _ in range(100)))
        assert {answer.status for answer in answers} == {200}
        await until(lambda: not served.listener._connections)


class Slow:
    """A page that is made when it may, and says which one it is."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, accept: str) -> Answer:
        self.kinds.append(accept)
        number = len(self.kinds)
        await self.go.acquire()
        return Answer(str(number).encode(), "text/plain")


async def test_all_who_wait_for_a_page_get_one_answer_that_is_newer_than_their_questions() -> None:
    slow = Slow()
    paced = Paced(slow, 0.0)
    first = asyncio.create_task(paced(""))
    await until(lambda: len(slow.kinds) == 1)
    later = [asyncio.create_task(paced("")) for _ in range(50)]
    await asyncio.sleep(0)
    slow.go.release()
    slow.go.release()
    assert (await first).body == b"1"
    assert {answer.body for answer in await asyncio.gather(*later)} == {b"2"}
    assert len(slow.kinds) == 2


async def test_who_leaves_while_a_page_is_made_for_him_leaves_the_others_theirs() -> None:
    slow = Slow()
    paced = Paced(slow, 0.0)
    first = asyncio.create_task(paced(""))
    await until(lambda: len(slow.kinds) == 1)
    second = asyncio.create_task(paced(""))
    await asyncio.sleep(0)
    first.cancel()
    slow.go.release()
    assert (await second).body == b"2"


async def test_page_has_an_answer_for_each_kind_and_no_more_than_there_are() -> None:
    slow = Slow()
    paced = Paced(slow, 0.0, ["text/a"])
    for _ in range(2):
        slow.go.release()
    answers = await asyncio.gather(*(paced(f"text/{kind};q=0.{n}") for n in range(9) for kind in "ab"))
    assert [answer.body for answer in answers] == [b"1", b"2"] * 9
    assert slow.kinds == ["text/a", ""]


async def test_page_is_not_made_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    paced = Paced(hello, 1000.0)
    for _ in range(3):
        await paced("")
    assert [seconds > 900 for seconds in slept] == [False, True, True]


async def test_closing_cuts_those_that_are_connected(no_leaks: None) -> None:
    async with asyncio.TaskGroup() as tasks:
        served = Served(PAGES, tasks, None)
        reader, writer = await served.connect()
        await until(lambda: len(served.listener._connections) == 1)
        await served.listener.close()
        async with asyncio.timeout(WAIT_SECONDS), closing(writer):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)


# --- addresses -------------------------------------------------------------------------------------------------------


async def test_port_that_is_taken_is_named_with_the_mend() -> None:
    async with serving() as served, asyncio.TaskGroup() as tasks:
        with pytest.raises(ResourceError) as caught:
            Listener(("127.0.0.1", served.port), {}, tasks)
    assert f"cannot listen on 127.0.0.1:{served.port} (http.listen)" in str(caught.value)
    assert "another process has it" in str(caught.value)
    assert 'http.listen to another port, or to ""' in str(caught.value)


async def test_address_that_is_not_this_host_is_named() -> None:
    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(ResourceError, match=r"192\.0\.2\.1:0 .*no interface of this host"):
            Listener(("192.0.2.1", 0), {}, tasks)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
async def test_ipv6_is_listened_on_with_ipv4_where_every_interface_is_meant() -> None:
    async with asyncio.TaskGroup() as tasks:
        listener = Listener(("::", 0), PAGES, tasks)
        listener.start()
        assert listener.url.startswith("http://[::]:")
        port = int(listener.url.rpartition(":")[2])
        for host in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(host, port)
            async with asyncio.timeout(WAIT_SECONDS), closing(writer):
                writer.write(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
                assert parsed(await reader.read()).body == b"hello\n"
        await listener.close()


# --- https -----------------------------------------------------------------------------------------------------------


def make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    directory = tmp_path_factory.mktemp("tls")
    try:
        return make_certificate(directory, "first"), make_certificate(directory, "second")
    except FileNotFoundError:
        pytest.skip("needs openssl")


async def whose(port: int, trusted: Path) -> bytes:
    """Ask over https, and return the answer's body; raises if the certificate is another one."""
    context = ssl.create_default_context(cafile=str(trusted))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    async with asyncio.timeout(WAIT_SECONDS), closing(writer):
        writer.write(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        return parsed(await reader.read()).body


async def test_https_serves_with_the_certificate_and_with_its_successor(
    pairs: tuple[tuple[Path, Path], tuple[Path, Path]], tmp_path: Path
) -> None:
    files = tmp_path / "a.pem", tmp_path / "a.key"

    def install(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, files, strict=True):
            (tmp_path / "new").write_bytes(source.read_bytes())
            os.replace(tmp_path / "new", target)

    install(pairs[0])
    async with serving(certificate=Certificate(*map(str, files))) as served:
        assert served.listener.url.startswith("https://127.0.0.1:")
        assert await whose(served.port, pairs[0][0]) == b"hello\n"
        install(pairs[1])
        assert await whose(served.port, pairs[1][0]) == b"hello\n"
        files[1].write_text("no key")
        assert await whose(served.port, pairs[1][0]) == b"hello\n"


async def test_client_without_a_handshake_is_cut(
    pairs: tuple[tuple[Path, Path], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.2)
    async with serving(certificate=Certificate(*map(str, pairs[0]))) as served:
        reader, writer = await served.connect()
        async with asyncio.timeout(WAIT_SECONDS), closing(writer):
            assert await reader.read() == b""
        await until(lambda: not served.listener._connections)


@pytest.mark.parametrize("wrong", ["no.pem", "key"])
def test_certificate_that_cannot_be_used_is_named(
    wrong: str, pairs: tuple[tuple[Path, Path], tuple[Path, Path]], tmp_path: Path
) -> None:
    certificate = tmp_path / "no.pem" if wrong == "no.pem" else pairs[0][0]
    with pytest.raises(ConfigError, match=r"http\.tls_certificate"):
        Certificate(str(certificate), str(pairs[1][1]))

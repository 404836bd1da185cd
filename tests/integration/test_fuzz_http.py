"""Garbage at the HTTP listener of a real daemon: it goes on serving, says nothing of it, and nothing grows.

The suite sends `REQUESTS`; ``CPE_TEST_FUZZ=100000`` sends a twentieth of that, as to the hand-off socket, for here too
a connection takes one request.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from tests.integration.harness import Daemon, Node
from tests.integration.processes import until

REQUESTS = max(600, int(os.environ.get("CPE_TEST_FUZZ", "0")) // 20)
WARM_UP = 200
CLIENTS = 8
GROWTH_BYTES = 8 << 20
SECONDS = 15.0

pytestmark = pytest.mark.timeout(600)

WHOLE = b"GET /metrics HTTP/1.1\r\nHost: node:9845\r\nAccept: text/plain\r\nUser-Agent: Prometheus/2.42\r\n\r\n"
TARGETS = [b"/", b"/metrics", b"/status", b"/readyz", b"//", b"*", b"http://x/metrics", b"/%ff%00", b"?", b"/\xff", b""]
METHODS = [b"GET", b"HEAD", b"POST", b"PRI", b"get", b"G\x00T", b"", b"CONNECT", b"OPTIONS"]
HEADERS = [
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    b"Expect: 100-continue",
    b"Accept: " + b"a/b," * 900,
    b"Accept-Encoding: gzip, br, zstd",
    b": empty",
    b"X\x00Y: z",
    b" folded",
    b"Cookie: " + b"x" * 5000,
]


def by_chance(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 4000))


def damaged(rng: random.Random) -> bytes:
    request = bytearray(WHOLE)
    for _ in range(rng.randrange(1, 6)):
        request[rng.randrange(len(request))] = rng.randrange(256)
    return bytes(request)


def cut_short(rng: random.Random) -> bytes:
    return WHOLE[: rng.randrange(len(WHOLE))]


def put_together(rng: random.Random) -> bytes:
    head = b" ".join(
        [rng.choice(METHODS), rng.choice(TARGETS), rng.choice([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b""])]
    )
    lines = [head, *rng.choices(HEADERS, k=rng.randrange(4))]
    return b"\r\n".join([*lines, b"", rng.randbytes(rng.randrange(64))])


WAYS: list[Callable[[random.Random], bytes]] = [by_chance, damaged, cut_short, put_together]


def pour(port: int, seed: int, number: int) -> None:
    """Send so many requests, a connection each; some are read to the end, others left."""
    rng = random.Random(seed)
    for _ in range(number):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
            client.settimeout(0.2 if rng.random() < 0.05 else SECONDS)
            client.sendall(rng.choice(WAYS)(rng))
            if rng.random() < 0.7:
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    continue


def test_garbage_over_http_leaves_the_daemon_serving(node: Node) -> None:
    daemon: Daemon = node.start_daemon(fresh=True, log__level="info")
    url = next(str(e) for e in daemon.status()["daemon"]["endpoints"] if str(e).startswith("http"))
    port = urlsplit(url).port or 0

    def connections() -> int:
        return len([fd for fd in os.listdir(f"/proc/{daemon.pid}/fd") if _is_socket(daemon.pid, fd)])

    def all_at_once(number: int) -> None:
        with ThreadPoolExecutor(CLIENTS) as clients:
            for poured in [clients.submit(pour, port, seed, number // CLIENTS) for seed in range(CLIENTS)]:
                poured.result()

    quiet = connections()
    all_at_once(WARM_UP)
    until(lambda: connections() <= quiet, "every connection is closed")
    before, said = daemon.usage(), daemon.said
    all_at_once(REQUESTS)
    until(lambda: connections() <= quiet, "every connection is closed")
    after = daemon.usage()
    assert after["rss_bytes"] < before["rss_bytes"] + GROWTH_BYTES
    assert after["threads"] <= before["threads"] + 4  # pools start their threads as they need them
    assert daemon.said == said
    with urlopen(f"{url}/healthz", timeout=SECONDS) as answer:
        assert answer.status == 200
    counted = daemon.status()["counters"]['cpe_protocol_errors_total{socket="http"}']
    assert counted > REQUESTS // 4


def _is_socket(pid: int, fd: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
    return False

"""What strangers, and friends with bad manners, do to a listener: each attack a function that a thread repeats.

Every attack makes a connection, says something wrong or too much over it, and lets it go. None of them judges the
answers: that the daemon keeps serving is for others to see.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Final

import zmq

from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.links.identity import new_routing_id
from cpe_daemon.links.keys import Credentials, new_pair
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import (
    PROTOCOL,
    EngineAdd,
    EngineRemove,
    FrontMessage,
    Message,
    OpenVersion,
    PushRequest,
    RollbackRequest,
    TrainerHello,
    WorkerHello,
    WorkerMessage,
)
from tests.data.wire_v1.samples import SAMPLES
from tests.integration.garbage import Frames, Garbage

Attack = Callable[[random.Random], int]
"""Does it once, and returns how many messages or requests that were."""

_MESSAGES: Final = 300
"""Over one connection."""

_LARGE: Final = 1 << 18
_SECONDS: Final = 2.0
_ACTS: Final = (TrainerHello, OpenVersion, PushRequest, RollbackRequest, EngineAdd, EngineRemove)
"""What a daemon does when it is asked properly, by who may: left out where the attacker may."""

_SHARDS: Final = [Shard("w", "uint8", (4096,))]
_KINDS: Final = (zmq.REQ, zmq.PUB, zmq.PUSH, zmq.PAIR, zmq.XPUB, zmq.ROUTER, zmq.DEALER)


# --- over libzmq: with a handshake that succeeds, or one that is refused -----------------------------------------


@dataclass(frozen=True, slots=True)
class Sayings:
    """Garbage, and proper messages of every type, said by a client.

    Args:
        endpoint: of the listener.
        accepts: what it takes.
        credentials: the client's; None for none.
        trusted: whether the client may do what the daemon would then really do: that is left out.
        session: whether it greets as a trainer first, and has a version under way.
    """

    endpoint: str
    accepts: UnionType
    credentials: Credentials | None = None
    trusted: bool = True
    session: bool = False

    def __call__(self, rng: random.Random) -> int:
        garbage = Garbage(self.accepts, self.may_say, rng.randrange(1 << 30))
        said = 0
        with client(self.endpoint, self.credentials) as peer:
            opening = self._opening(rng) if self.session else ()
            for frames in itertools.chain(opening, self._mixed(rng, iter(garbage))):
                if not peer.poll(int(_SECONDS * 1000), zmq.POLLOUT):
                    break  # the daemon does not read so fast, or has cut the connection: next time
                peer.send_multipart(frames)
                said += 1
                with contextlib.suppress(zmq.Again):
                    while True:
                        peer.recv_multipart(zmq.NOBLOCK)
        return said

    def may_say(self, message: Message) -> bool:
        """Whether it is among what this client says."""
        return not isinstance(message, (*_ACTS, WorkerHello)) if self.trusted else True

    def _mixed(self, rng: random.Random, garbage: Iterator[Frames]) -> Iterator[Frames]:
        proper = [m for pair in SAMPLES.values() for m in pair if self.may_say(m)]
        for _ in range(_MESSAGES):
            way = rng.randrange(20)
            if way < 12:
                yield next(garbage)
            elif way < 17:
                yield [encode(rng.choice(proper)), *[rng.randbytes(rng.randrange(2000))] * rng.randrange(3)]
            elif way < 19:
                yield [encode(rng.choice(proper)), bytes(rng.randrange(_LARGE))]
            else:
                yield [b"", *[b"x"] * rng.choice((2, 3, 1000))]

    def _opening(self, rng: random.Random) -> Iterator[Frames]:
        run = f"run-{rng.randrange(1 << 40)}"
        yield [encode(TrainerHello(PROTOCOL, "fuzzed", run, 0, 1))]
        yield [encode(OpenVersion(1, VersionId("fuzzed", run, 1), 1, 4096))]
        yield [encode(SAMPLES["manifest_part"][0])]


@contextlib.contextmanager
def client(endpoint: str, credentials: Credentials | None, kind: int = zmq.DEALER) -> Iterator[zmq.Socket[bytes]]:
    """A socket that is connected, or tries."""
    with zmq.Context() as context, context.socket(kind) as made:
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.SNDHWM, 64)
        if credentials is not None:
            made.setsockopt(zmq.IDENTITY, new_routing_id(credentials.pair.public))
            made.setsockopt(zmq.CURVE_SERVERKEY, credentials.server_key.encode())
            made.setsockopt(zmq.CURVE_PUBLICKEY, credentials.pair.public.encode())
            made.setsockopt(zmq.CURVE_SECRETKEY, credentials.pair.secret.encode())
        made.connect(endpoint)
        yield made


def refused_handshakes(endpoint: str, server_key: str, allowed: Credentials | None) -> Attack:
    """Knock with keys that are not allowed, with the wrong one for the daemon, and with none."""

    def knock(rng: random.Random) -> int:
        stranger = Credentials(new_pair(), server_key)
        mistaken = Credentials(allowed.pair if allowed else new_pair(), new_pair().public)
        for credentials in (stranger, mistaken, None):
            with client(endpoint, credentials) as peer:
                peer.poll(rng.randrange(1, 60), zmq.POLLOUT)
        return 3

    return knock


def odd_sockets(endpoint: str, credentials: Credentials | None, largest: int) -> Attack:
    """Connect sockets of other kinds, leave in the middle of a message, and send frames that are too large."""

    def connect(rng: random.Random) -> int:
        with client(endpoint, credentials, rng.choice(_KINDS)) as peer:
            if peer.poll(500, zmq.POLLOUT):
                with contextlib.suppress(zmq.ZMQError):
                    for _ in range(rng.randrange(1, 50)):
                        peer.send(rng.randbytes(100), zmq.SNDMORE | zmq.NOBLOCK)
        with client(endpoint, credentials) as peer:
            if peer.poll(500, zmq.POLLOUT):
                peer.send(bytes(largest + 1))
                peer.poll(20)
        return 2

    return connect


# --- raw bytes: before any handshake -----------------------------------------------------------------------------

Connect = Callable[[], socket.socket]


def tcp(url: str) -> Connect:
    """To ``tcp://HOST:PORT``, or ``http://HOST:PORT``."""
    host, _, port = url.partition("://")[2].rstrip("/").rpartition(":")
    return lambda: socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS)


def unix(path: str) -> Connect:
    """To a unix socket."""

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(_SECONDS)
        try:
            made.connect(path)
        except OSError:
            made.close()
            raise
        return made

    return connect


def raw(connect: Connect, speeches: Callable[[random.Random], Sequence[bytes]]) -> Attack:
    """Say some bytes, wait or do not wait for an answer, and leave."""

    def speak(rng: random.Random) -> int:
        with contextlib.suppress(OSError), connect() as connection:
            for speech in speeches(rng):
                connection.sendall(speech)
                if rng.randrange(3) == 0:
                    connection.settimeout(0.02)
                    connection.recv(4096)
        return 1

    return speak


_GREETING: Final = b"\xff" + bytes(8) + b"\x7f"


def greeting(mechanism: bytes) -> bytes:
    """ZMTP's first words."""
    return _GREETING + b"\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes) -> bytes:
    """A command of ZMTP."""
    said = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(said)]) + said if len(said) < 256 else b"\x06" + len(said).to_bytes(8, "big") + said


READY: Final = command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00")


def zmtp(rng: random.Random) -> Sequence[bytes]:
    """ZMTP gone wrong: in the greeting, in the handshake of either mechanism, and after it."""
    null, curve = greeting(b"NULL"), greeting(b"CURVE")
    hello = command(b"HELLO", b"\x01\x00" + bytes(72) + rng.randbytes(32 + 8 + 80))
    initiate = command(b"INITIATE", rng.randbytes(96 + 8 + rng.randrange(16, 600)))
    return rng.choice(
        (
            [b""],
            [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
            [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200)],
            [rng.randbytes(rng.randrange(300))],
            [null[: rng.randrange(len(null))]],
            [_damaged(rng, null), READY],
            [null, READY, rng.randbytes(rng.randrange(200))],
            [null, _damaged(rng, READY)],
            [null, READY, b"\x02" + (1 << rng.randrange(20, 63)).to_bytes(8, "big"), bytes(1000)],
            [null, READY, b"\x01\x04abcd" * rng.randrange(1, 5000)],
            [null, READY, command(b"PING", b"\x00\x01" + rng.randbytes(rng.randrange(40)))],
            [null, READY, b"\x00\x04abcd" * rng.randrange(1, 200)],
            [greeting(rng.randbytes(20))],
            [greeting(b"PLAIN"), command(b"HELLO", b"\x05admin\x05admin")],
            [curve, hello],
            [curve, _damaged(rng, hello)],
            [curve, hello[: rng.randrange(len(hello))]],
            [curve, hello, initiate],
            [curve, initiate],
            [curve, command(b"MESSAGE", rng.randbytes(rng.randrange(200)))],
            [curve, READY],
            [curve, rng.randbytes(rng.randrange(500))],
        )
    )


def handoff(rng: random.Random) -> Sequence[bytes]:
    """Tokens that were never given, and what is none."""
    return [
        rng.choice(
            (
                b"",
                b"cpe-fd1:" + rng.randbytes(32),
                b"cpe-fd1:" + rng.randbytes(rng.randrange(32)),
                b"cpe-fd1:"[: rng.randrange(9)],
                rng.randbytes(rng.randrange(100)),
                rng.randbytes(20_000),
            )
        )
    ]


def http(rng: random.Random) -> Sequence[bytes]:
    """Requests that are cut short, endless, contradictory, or no requests."""
    path = rng.choice((b"/metrics", b"/status", b"/readyz", b"/healthz", b"/", b"/../../etc/passwd", b"*"))
    line = b"GET " + path + b" HTTP/1.1\r\n"
    return rng.choice(
        (
            [b""],
            [line + b"Host: x\r\n\r\n"],
            [line + b"Host: x\r\n\r\n"] * rng.randrange(1, 20),
            [line[: rng.randrange(len(line))]],
            [line + b"X: " + b"y" * rng.choice((100, 70_000)) + b"\r\n\r\n"],
            [line + b"A: b\r\n" * rng.choice((10, 5000)) + b"\r\n"],
            [b"POST /status HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n" + rng.randbytes(100)],
            [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n"],
            [line + b"Content-Length: -1\r\nContent-Length: 5\r\n\r\n"],
            [rng.randbytes(rng.randrange(2000))],
            [bytes([letter]) for letter in line + b"\r\n"],
            [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200)],
            [b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n"],
            [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        )
    )


def _damaged(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


# --- by listener -------------------------------------------------------------------------------------------------


def on_front(endpoint: str, connect: Connect, largest: int) -> Iterable[Attack]:
    """On an endpoint that takes no keys."""
    yield Sayings(endpoint, FrontMessage)
    yield Sayings(endpoint, FrontMessage, session=True)
    yield odd_sockets(endpoint, None, largest)
    yield raw(connect, zmtp)


def on_curve(endpoint: str, largest: int, by_role: dict[str, Credentials]) -> Iterable[Attack]:
    """On an endpoint that takes keys: before the handshake, at it, and after it from each role."""
    server_key = next(iter(by_role.values())).server_key
    yield raw(tcp(endpoint), zmtp)
    yield refused_handshakes(endpoint, server_key, by_role.get("trainer"))
    for role, credentials in by_role.items():
        yield Sayings(endpoint, FrontMessage, credentials, trusted=role in ("trainer", "operator"))
        yield odd_sockets(endpoint, credentials, largest)
    yield Sayings(endpoint, FrontMessage, by_role["trainer"], session=True)


def on_engines(endpoint: str, connect: Connect, largest: int) -> Iterable[Attack]:
    """On the engines' socket."""
    yield Sayings(endpoint, WorkerMessage)
    yield odd_sockets(endpoint, None, largest)
    yield raw(connect, zmtp)

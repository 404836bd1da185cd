"""Passing descriptors: a token is good once, garbage is counted, and a tether's end is noticed however it comes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpe_daemon.errors import ConfigError, PeerLostError, ResourceError
from cpe_daemon.links import handoff
from cpe_daemon.links.handoff import HandoffServer, Tether, claim

WAIT_SECONDS = 20.0
GREETING = b"cpe-fd1:"

CHILD = """
import sys
from cpe_daemon.links.handoff import claim
fd, tether = claim(sys.argv[1], bytes.fromhex(sys.argv[2]))
print("claimed", flush=True)
sys.stdin.read()
"""


class Counted:
    """Refusals as they come."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        self._changed.set()

    async def reach(self, number: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.names) < number:
                self._changed.clear()
                await self._changed.wait()


@dataclass
class Door:
    """A server, what it counted, and a descriptor that it may offer."""

    server: HandoffServer
    fd: int
    counted: Counted

    @property
    def path(self) -> str:
        return str(self.server.path)

    @property
    def refused(self) -> list[str]:
        return self.counted.names

    def offer(self) -> tuple[bytes, asyncio.Event]:
        gone = asyncio.Event()
        return self.server.offer(self.fd, gone.set), gone

    async def claim(self, token: bytes) -> tuple[int, Tether]:
        return await asyncio.to_thread(claim, self.path, token, WAIT_SECONDS)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)


@contextlib.asynccontextmanager
async def opened(path: Path, *, started: bool = True) -> AsyncIterator[Door]:
    read, write = os.pipe()
    os.write(write, b"through the door")
    os.close(write)
    async with asyncio.TaskGroup() as tasks:
        counted = Counted()
        door = Door(HandoffServer(path, tasks, on_protocol_error=counted), read, counted)
        if started:
            door.server.start()
        try:
            yield door
        finally:
            door.server.close()
            os.close(read)


@pytest.fixture
async def door(no_leaks: None, runtime_dir: Path) -> AsyncIterator[Door]:
    async with opened(runtime_dir / "handoff.sock") as server:
        yield server


async def happens(event: asyncio.Event) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        await event.wait()


async def test_descriptor_arrives_and_is_the_takers(door: Door) -> None:
    token, gone = door.offer()
    fd, tether = await door.claim(token)
    assert os.read(fd, 100) == b"through the door"
    assert not os.get_inheritable(fd)
    assert not tether.cut
    assert not gone.is_set()
    os.close(fd)
    tether.close()
    await happens(gone)


async def test_token_is_good_once(door: Door) -> None:
    token, gone = door.offer()
    fd, tether = await door.claim(token)
    with pytest.raises(PeerLostError, match="restarted"):
        await door.claim(token)
    await door.counted.reach(1)
    assert not gone.is_set()
    assert not tether.cut
    os.close(fd)
    tether.close()
    await happens(gone)
    assert door.refused == ["handoff"]


async def test_two_offers_of_one_descriptor_are_apart(door: Door) -> None:
    (first, first_gone), (second, second_gone) = door.offer(), door.offer()
    assert first != second
    one, two = await door.claim(first), await door.claim(second)
    one[1].close()
    await happens(first_gone)
    assert not second_gone.is_set()
    assert not two[1].cut
    two[1].close()
    await happens(second_gone)
    os.close(one[0])
    os.close(two[0])


async def test_withdrawn_offer_is_refused(door: Door) -> None:
    token, gone = door.offer()
    door.server.withdraw(token)
    door.server.withdraw(token)
    door.server.withdraw(b"never offered")
    with pytest.raises(PeerLostError):
        await door.claim(token)
    assert not gone.is_set()


async def test_withdrawing_what_was_taken_changes_nothing(door: Door) -> None:
    token, gone = door.offer()
    fd, tether = await door.claim(token)
    door.server.withdraw(token)
    assert not tether.cut
    assert not gone.is_set()
    os.close(fd)
    tether.close()
    await happens(gone)


async def test_killed_child_is_noticed(door: Door) -> None:
    token, gone = door.offer()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, door.path, token.hex(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), WAIT_SECONDS * 3) == b"claimed\n"
    assert not gone.is_set()
    child.send_signal(signal.SIGKILL)
    await happens(gone)
    assert await child.wait() == -signal.SIGKILL
    assert door.refused == []


async def test_taker_that_ended_before_it_was_served_is_noticed(no_leaks: None, runtime_dir: Path) -> None:
    """It asked and died: the descriptor cannot be sent, and whoever offered it has to know."""
    async with opened(runtime_dir / "h.sock", started=False) as door:
        token, gone = door.offer()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.connect(door.path)
            dead.sendall(GREETING + token)
        door.server.start()
        await happens(gone)
        assert door.refused == []


async def test_chatter_on_a_tether_means_nothing(door: Door) -> None:
    token, gone = door.offer()
    reader, writer = await door.connect()
    writer.write(GREETING + token)
    assert await reader.readexactly(1) == b"\x01"
    writer.write(os.urandom(10_000))
    await writer.drain()
    other, other_gone = door.offer()
    fd, tether = await door.claim(other)
    assert not gone.is_set()
    writer.close()
    await happens(gone)
    assert not other_gone.is_set()
    assert door.refused == []
    os.close(fd)
    tether.close()
    await happens(other_gone)


async def test_closed_server_cuts_every_tether(no_leaks: None, runtime_dir: Path) -> None:
    path = runtime_dir / "h.sock"
    async with opened(path) as door:
        token, gone = door.offer()
        unclaimed, unclaimed_gone = door.offer()
        idle = await door.connect()
        fd, tether = await door.claim(token)  # behind the idle one, which is being served by now
        door.server.close()
        await happens(gone)
        assert not unclaimed_gone.is_set()
        assert tether.cut
        assert tether.cut
        assert not path.exists()
        with pytest.raises(PeerLostError, match="cannot fetch memory"):
            await door.claim(unclaimed)
        idle[1].close()
        os.close(fd)
        tether.close()


# --- garbage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"c",
        b"cpe-fd1",
        GREETING,
        GREETING + b"short",
        GREETING + bytes(32),
        GREETING + bytes(33),
        b"cpe-fd2:" + bytes(32),
        b"x",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95" + bytes(50),
        os.urandom(100_000),
    ],
    ids=lambda data: f"{len(data)} bytes {data[:8]!r}",
)
async def test_garbage_is_counted_and_cut_off(request_bytes: bytes, door: Door) -> None:
    token, gone = door.offer()
    reader, writer = await door.connect()
    with contextlib.suppress(ConnectionError):
        writer.write(request_bytes)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    writer.close()
    await door.counted.reach(1)
    assert door.refused == ["handoff"]
    fd, tether = await door.claim(token)
    os.close(fd)
    tether.close()
    await happens(gone)


async def test_request_may_come_byte_by_byte(door: Door) -> None:
    token, gone = door.offer()
    reader, writer = await door.connect()
    for byte in GREETING + token:
        writer.write(bytes([byte]))
        await writer.drain()
    assert await asyncio.wait_for(reader.readexactly(1), WAIT_SECONDS) == b"\x01"
    writer.close()
    await happens(gone)


async def test_wrong_greeting_is_refused_at_its_first_byte(door: Door) -> None:
    reader, writer = await door.connect()
    writer.write(b"x")
    assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    assert door.refused == ["handoff"]
    writer.close()


async def test_silent_connection_is_cut_at_its_deadline(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "_CLAIM_SECONDS", 0.01)
    reader, writer = await door.connect()
    writer.write(GREETING)
    assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    assert door.refused == ["handoff"]
    writer.close()


async def test_crowd_of_silent_connections_only_delays_a_claim(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold every place there is; who comes after waits for one, and is not turned away."""
    monkeypatch.setattr(handoff, "_CLAIM_SECONDS", 0.5)
    crowd = [await door.connect() for _ in range(70)]
    token, gone = door.offer()
    fd, tether = await door.claim(token)
    os.close(fd)
    tether.close()
    await happens(gone)
    await door.counted.reach(70)
    for _, writer in crowd:
        writer.close()


async def test_every_one_of_many_garbage_connections_is_counted(door: Door) -> None:
    rng = random.Random(3)

    def knock() -> None:
        for _ in range(300):
            with socket.socket(socket.AF_UNIX) as knocking, contextlib.suppress(ConnectionError):
                knocking.connect(door.path)
                knocking.sendall(rng.randbytes(rng.randrange(60)))

    await asyncio.to_thread(knock)
    await door.counted.reach(300)
    assert len(door.refused) == 300


# --- the socket ------------------------------------------------------------------------------------------------------


async def test_socket_is_for_owner_and_group_only(door: Door) -> None:
    assert stat.S_IMODE(os.stat(door.path).st_mode) == 0o660


async def test_socket_that_is_taken_is_a_config_error(door: Door) -> None:
    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(ConfigError, match="cannot listen on"):
            HandoffServer(door.server.path, tasks)


async def test_offer_without_descriptors_left_is_a_resource_error(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", exhausted)
    with pytest.raises(ResourceError, match="Too many open files"):
        door.offer()


async def test_claim_where_nobody_listens_says_so(runtime_dir: Path) -> None:
    with pytest.raises(PeerLostError, match="cannot fetch memory"):
        claim(str(runtime_dir / "nothing.sock"), bytes(32), 1.0)


async def test_claim_of_a_mute_daemon_ends_at_its_deadline(no_leaks: None, runtime_dir: Path) -> None:
    async with opened(runtime_dir / "h.sock", started=False) as door:
        with pytest.raises(PeerLostError, match=r"within 0\.01 s"):
            claim(door.path, bytes(32), 0.01)


@pytest.mark.parametrize(("reply", "count"), [(b"\x01", 0), (b"\x02", 1), (b"", 0)])
def test_claim_of_an_impostor_is_refused(no_leaks: None, runtime_dir: Path, reply: bytes, count: int) -> None:
    path = str(runtime_dir / "h.sock")
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(path)
        impostor.listen()
        client = subprocess.Popen([sys.executable, "-c", IMPOSED, path], stdout=subprocess.PIPE, text=True)
        connection, _ = impostor.accept()
        with connection:
            connection.recv(100)
            if reply:
                socket.send_fds(connection, [reply], [impostor.fileno()] * count)
        said, _ = client.communicate(timeout=WAIT_SECONDS * 3)
    assert said == "lost\n"


IMPOSED = """
import sys
from cpe_daemon.errors import PeerLostError
from cpe_daemon.links.handoff import claim
try:
    claim(sys.argv[1], bytes(32))
except PeerLostError:
    print("lost")
"""

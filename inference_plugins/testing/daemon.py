"""A daemon as an engine's worker sees it, which says what a test has it say: a real socket, real tethers, real slots.

Nothing is decided here. It listens in a thread of its own, so that a worker is answered while the test does other
things; slots are shared memory, as on a host without GPUs.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
import time
from pathlib import Path
from typing import Final, Self, TypeVar

import zmq
import zmq.asyncio

from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import ProtocolError
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.wire.codec import Codec, encode
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Message,
    Ping,
    Pong,
    SlotSet,
    WorkerBye,
    WorkerHello,
    WorkerMessage,
    WorkerWelcome,
)
from inference_plugins.testing.errors import ConformanceError

_START_SECONDS: Final = 10.0
_Kind = TypeVar("_Kind", bound=Message)


class ScriptedDaemon:
    """Runs from `start` to `stop`; `start` again is a restart. For one worker, and for one thread beside its own.

    Args:
        directory: for its sockets; the path has to be short, as those of sockets are.
        heartbeat_seconds: what it tells the worker.
        answers: answer pings and goodbyes at once, and pass over them. Otherwise they come to `expect`.
    """

    def __init__(self, directory: Path, *, heartbeat_seconds: float = 0.3, answers: bool = True) -> None:
        self.endpoint = f"ipc://{directory / 'engines.sock'}"
        self.generation = ""
        self._directory = directory
        self._heartbeat_seconds = heartbeat_seconds
        self._answers = answers
        self._codec = Codec(WorkerMessage)
        self._came: queue.SimpleQueue[Message | ConformanceError] = queue.SimpleQueue()
        self._peer = b""
        self._sent: object = None
        """The last message on its way: a ROUTER takes each at once, or drops it."""
        self._thread: threading.Thread | None = None

    # --- the test's thread -------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen, as a daemon that knows nobody.

        Raises:
            ConformanceError: it cannot.
        """
        self.generation = secrets.token_hex(4)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="scripted-daemon", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_SECONDS):
            raise ConformanceError(f"the scripted daemon could not listen in {self._directory}")
        return self

    def stop(self) -> None:
        """End at once, as if killed: tethers are cut, and nobody hears a farewell."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(_START_SECONDS)
            self._thread = None
        self._came = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def expect(self, kind: type[_Kind], seconds: float = 10.0) -> _Kind | None:
        """Return the next message of a kind; None if none comes in time. Pings before it are passed over.

        Raises:
            ConformanceError: another message came.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                message = self._came.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(message, ConformanceError):
                raise message
            if isinstance(message, kind):
                return message
            if not isinstance(message, Ping):
                raise ConformanceError(f"the worker said {message}, where {kind.__name__} was awaited")

    def say(self, message: Message) -> None:
        """Send a message to the worker that was heard last."""
        self.say_raw(encode(message))

    def say_raw(self, header: bytes) -> None:
        """Send bytes in place of a message."""
        self._loop.call_soon_threadsafe(self._send, header)

    def welcome(self, *, hold: bool = False) -> None:
        """Take the worker in. ``hold``: it must not serve before it is resumed."""
        self.say(
            WorkerWelcome(PROTOCOL, self.generation, self._heartbeat_seconds, self._tie(), self.handoff_path, hold)
        )

    def offer(self, slots: SharedMemory, slot_bytes: int) -> SlotSet:
        """Describe memory to the worker as slots that it can open once."""

        async def made() -> bytes:
            return self._handoff.offer(slots.fd)

        token = asyncio.run_coroutine_threadsafe(made(), self._loop).result(_START_SECONDS)
        return SlotSet("shm", "shm-0", slots.nbytes // slot_bytes, slot_bytes, [token])

    @property
    def handoff_path(self) -> str:
        """Where tethers and slots are fetched."""
        return str(self._directory / "handoff.sock")

    def _tie(self) -> bytes:
        async def tied() -> bytes:
            return self._handoff.tie(lambda: None)

        return asyncio.run_coroutine_threadsafe(tied(), self._loop).result(_START_SECONDS)

    # --- its own thread ----------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(self.endpoint)
            async with asyncio.TaskGroup() as tasks:
                self._handoff = HandoffServer(Path(self.handoff_path), tasks)
                self._handoff.start()
                listening = tasks.create_task(self._listen())
                self._started.set()
                await self._ended.wait()
                listening.cancel()
                self._handoff.close()
        finally:
            self._socket.close()
            context.term()

    async def _listen(self) -> None:
        while True:
            peer, header = await self._socket.recv_multipart()
            try:
                message = self._codec.decode(header)
            except ProtocolError as error:
                self._came.put(ConformanceError(f"the worker sent what is no message: {error}"))
                continue
            if isinstance(message, WorkerHello):
                self._peer = peer
            if self._answers and isinstance(message, Ping | WorkerBye):
                self._send(encode(Pong(self.generation)))
            elif peer == self._peer:
                self._came.put(message)

    def _send(self, header: bytes) -> None:
        if not self._ended.is_set() and self._peer:
            self._sent = self._socket.send_multipart([self._peer, header], zmq.NOBLOCK)

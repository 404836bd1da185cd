"""The client's side of ZeroMQ: a DEALER for one thread of a trainer's or an engine's process.

Other threads wake the owner by `wake`; everything else belongs to the thread that polls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import UnionType
from typing import Final

import zmq

from cpe_daemon.errors import ConfigError, PeerLostError
from cpe_daemon.links.frames import receive_frames, send_frames
from cpe_daemon.links.handshake import Handshakes
from cpe_daemon.links.identity import new_routing_id
from cpe_daemon.links.keys import Credentials
from cpe_daemon.wire.codec import MAX_HEADER_BYTES, Codec, encode
from cpe_daemon.wire.messages import Message

_QUEUE: Final = 4096


class Dealer:
    """A connection to a daemon's ROUTER; reconnects by itself, under an identity of its own.

    Args:
        endpoint: ``ipc://PATH`` or ``tcp://HOST:PORT``.
        accepts: union of the message types that the daemon sends in this conversation.
        credentials: the keys for an endpoint over tcp; None where it takes none.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str, accepts: UnionType, credentials: Credentials | None = None) -> None:
        self.endpoint = endpoint
        self._codec = Codec(accepts)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, _QUEUE),
            (zmq.RCVHWM, _QUEUE),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.MAXMSGSIZE, MAX_HEADER_BYTES),
            (zmq.IMMEDIATE, 1),  # while nobody is connected a send waits, instead of being queued for later
        ):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.IDENTITY, new_routing_id(credentials.pair.public if credentials else None))
        if credentials is not None:
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, credentials.pair.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, credentials.pair.secret.encode())
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, credentials.server_key.encode())
        self._handshakes: Handshakes | None = None
        if endpoint.startswith("tcp://"):
            self._handshakes = Handshakes(self._socket, endpoint, keyed=credentials is not None)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._close_socket()
            why = zmq.strerror(error.errno or 0)
            raise ConfigError(
                f"cannot use endpoint {endpoint!r} ({why}): write tcp://ADDRESS:PORT, with a port of the daemon's"
                " ingest.listen, or ipc:///PATH"
            ) from None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def send(self, message: Message, *frames: bytes | memoryview | zmq.Frame, timeout: float = 5.0) -> None:
        """Send a message and its bulk frames, waiting up to ``timeout`` seconds for a connection and room.

        Bytes are copied at once; a `zmq.Frame` made with ``copy=False`` is sent from the memory that it views.

        Raises:
            PeerLostError: the daemon did not take it in time.
            AccessError: it never will, because of the keys.
        """
        parts: list[bytes | memoryview | zmq.Frame] = [encode(message), *frames]
        deadline = time.monotonic() + timeout
        while True:
            try:
                send_frames(self._socket, parts)
            except zmq.Again:
                left = deadline - time.monotonic()
                if left <= 0:
                    port = ", and is that port in its ingest.listen" if self.endpoint.startswith("tcp://") else ""
                    raise PeerLostError(
                        f"no daemon at {self.endpoint} took a message for {timeout:g} s; is it running there{port}?"
                    ) from None
                self._await_room(min(left, 1.0))
            else:
                return

    def receive(self, timeout: float) -> tuple[Message, Sequence[memoryview]] | None:
        """Return the next message and its frames, or None after ``timeout`` seconds or a `wake`.

        Raises:
            ProtocolError: the daemon sent something that is no message of this conversation.
        """
        if not self._readable():
            if timeout <= 0:
                return None
            ready = dict(self._poller.poll(int(timeout * 1000)))
            if self._wake_read in ready:
                self._clear_wake()
            if self._handshakes is not None:
                self._handshakes.look()  # what is not read waits in memory
            if not self._readable():
                return None
        try:
            parts = receive_frames(self._socket)
        except zmq.Again:
            return None
        frames = [memoryview(part.buffer) for part in parts]
        return self._codec.decode(frames[0]), frames[1:]

    def wake(self) -> None:
        """Make `receive` return; callable from any thread."""
        try:
            os.write(self._wake_write, b"\0")
        except (BlockingIOError, OSError):
            return  # woken already, or closed

    def close(self) -> None:
        """Close at once; what was not delivered is dropped."""
        self._close_socket()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _await_room(self, seconds: float) -> None:
        """Wait until something may be sent, or is known of why it may not.

        Raises:
            AccessError: it is the keys.
        """
        waiting = zmq.Poller()
        waiting.register(self._socket, zmq.POLLOUT)
        if self._handshakes is not None:
            self._handshakes.check()
            waiting.register(self._handshakes.monitor, zmq.POLLIN)
        waiting.poll(int(seconds * 1000) + 1)

    def _close_socket(self) -> None:
        if self._handshakes is not None:
            self._handshakes.close()
        self._socket.close()
        self._context.term()

    def _readable(self) -> bool:
        """Whether a message waits. Asks the socket itself: a poll costs ten times as much."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _clear_wake(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return

"""Why a connection over tcp does not come about, as far as a client can know: libzmq tries for ever and says nothing.

What it does tell is read from the socket's monitor. Some of it is certain at once. That the other side just ends the
connection, as it does when it cannot read what was encrypted for another key, is a reason when it happens repeatedly.
"""

from __future__ import annotations

import time
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from cpe_daemon.errors import AccessError

_EVENTS: Final = (
    zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_SUCCEEDED
)
_MECHANISM_MISMATCH: Final = 0x11000002
_TAKES_NONE: Final = (
    "takes no keys: it listens without encryption; leave the key out, or set ingest.insecure: false there"
)
_TAKES_ONLY_KEYS: Final = (
    "takes only clients with a key; give one that its daemon allows, with the daemon's public key: key= and"
    " server_key=, or --key and --server-key"
)
_TRIES: Final = 3
_TRYING_SECONDS: Final = 1.0
"""So often, and over so long a time, a handshake has to fail without a reason before that counts as one: a daemon that
is just ending may cut off any."""


class Handshakes:
    """Watches a socket's attempts to connect. Belongs to the socket's thread.

    Args:
        socket: not connected yet.
        endpoint: where it will connect, for messages.
        keyed: whether it has a key.
    """

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str, *, keyed: bool) -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._keyed = keyed
        self._monitor = socket.get_monitor_socket(_EVENTS)
        self._failures = 0
        self._failing_since = 0.0
        self._reason = ""

    @property
    def monitor(self) -> zmq.Socket[bytes]:
        """Readable when there is something to look at."""
        return self._monitor

    def look(self) -> None:
        """Take note of what has happened."""
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._note(zmq.Event(event["event"]), int(event["value"]))

    def check(self) -> None:
        """Say why no connection comes about, if that is known.

        Raises:
            AccessError: the keys of the two sides do not fit, and trying again will not help.
        """
        self.look()
        if not self._reason and self._failures >= _TRIES and time.monotonic() - self._failing_since >= _TRYING_SECONDS:
            self._reason = self._guess()
        if self._reason:
            raise AccessError(self._reason)

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def _note(self, event: zmq.Event, value: int) -> None:
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._failures, self._reason = 0, ""
        elif event == zmq.Event.HANDSHAKE_FAILED_AUTH:
            self._reason = (
                f"{self._endpoint} does not allow this key (it may never have, or it was revoked); `cpe keys allow` on"
                " the daemon's node lets it in"
            )
        elif event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value == _MECHANISM_MISMATCH:
            self._reason = f"{self._endpoint} {_TAKES_NONE if self._keyed else _TAKES_ONLY_KEYS}"
        else:
            if not self._failures:
                self._failing_since = time.monotonic()
            self._failures += 1

    def _guess(self) -> str:
        hint = (
            "is the server key given here its public key (`cpe keys list` on its node shows it)? Or perhaps it"
            f" {_TAKES_NONE}"
            if self._keyed
            else f"if a daemon listens there, it {_TAKES_ONLY_KEYS}"
        )
        return f"{self._endpoint} ended the connection during the handshake, {self._failures} times; {hint}"

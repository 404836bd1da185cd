"""What a service manager hears of a daemon: a real notify socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

import pytest


class InitSystem:
    """The socket in ``NOTIFY_SOCKET``, and all that came over it, in order.

    Args:
        path: of the socket.
        watchdog_seconds: the period of the watchdog; 0: there is none.
    """

    def __init__(self, path: Path, watchdog_seconds: float = 0.0) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path)}
        if watchdog_seconds:
            self.environment["WATCHDOG_USEC"] = str(int(watchdog_seconds * 1_000_000))
        self.heard: list[tuple[float, Mapping[str, str]]] = []
        """When each message came, and its assignments."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def hear(self, name: str, value: str = "", seconds: float = 20.0) -> str:
        """Await the next message that assigns ``name`` something with ``value`` in it; return what."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            message = self._next(left)
            if message is not None and value in (said := message.get(name, "")) and name in message:
                return said
        pytest.fail(f"{name}={value} was not said within {seconds:g} s; last: {[said for _, said in self.heard[-5:]]}")

    def hear_out(self, seconds: float = 0.0) -> None:
        """Take what has come, and what comes within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._next(max(0.0, deadline - time.monotonic())) is not None or time.monotonic() < deadline:
            pass

    def times_of(self, name: str) -> list[float]:
        """When ``name`` was assigned something, as far as that was heard."""
        return [at for at, message in self.heard if name in message]

    def said(self, name: str) -> list[str]:
        """All that ``name`` was assigned, as far as that was heard."""
        return [message[name] for _, message in self.heard if name in message]

    def close(self) -> None:
        """Hear nothing more."""
        self._socket.close()

    def _next(self, seconds: float) -> Mapping[str, str] | None:
        self._socket.settimeout(max(seconds, 0.000_001))
        try:
            text = self._socket.recv(65536).decode()
        except TimeoutError:
            return None
        message = dict(line.split("=", 1) for line in text.splitlines())
        self.heard.append((time.monotonic(), message))
        return message

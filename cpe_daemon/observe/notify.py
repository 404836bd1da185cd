"""What the init system is told: sd_notify(3), a few lines of text in a datagram to the socket in ``NOTIFY_SOCKET``.

Nothing here raises or waits: that a message could not be sent must never matter to the daemon. One that finds the init
system's queue full is kept, and goes with the next.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

import structlog

log = structlog.get_logger(__name__)

_EVERY_TIME: Final = ("WATCHDOG", "EXTEND_TIMEOUT_USEC")
"""Said anew whenever it is so; an old one is not kept, for it is about the moment in which it was sent."""


class Notifier:
    """The connection to the init system, if there is one. Any thread may use it, one at a time.

    Args:
        environ: has ``NOTIFY_SOCKET``, and ``WATCHDOG_USEC`` with ``WATCHDOG_PID`` if the service has a watchdog.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        name = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._socket: socket.socket | None = None
        if name.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        elif name:
            log.warning("notify.unsupported", address=name)
        self.watchdog_seconds = _watchdog_seconds(environ) if self._socket else 0.0
        """Within which the watchdog has to be fed again, and again; 0.0: there is none."""
        self._unsent: dict[str, str] = {}
        self._status = ""
        self._complained = False

    @property
    def connected(self) -> bool:
        """Whether there is an init system that wants to know."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The service has started."""
        self._status = status
        self._send(READY="1", STATUS=status)

    def status(self, text: str) -> None:
        """Say in one line how the service is, if that is not what was said last."""
        if text != self._status:
            self._status = text
            self._send(STATUS=text)

    def feed_watchdog(self) -> None:
        """The service is well; nothing is said where there is no watchdog."""
        if self.watchdog_seconds:
            self._send(WATCHDOG="1")

    def extend_timeout(self, seconds: float) -> None:
        """Starting, or stopping, goes on: whatever its time limit, it has ``seconds`` from now."""
        self._send(EXTEND_TIMEOUT_USEC=str(int(seconds * 1_000_000)))

    def beginning_anew(self, status: str) -> None:
        """The service is about to start again in the same process; `ready` says when it has."""
        self._status = status
        self._send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000), STATUS=status)

    def stopping(self, status: str) -> None:
        """The service begins to stop."""
        self._status = status
        self._send(STOPPING="1", STATUS=status)

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, **assignments: str) -> None:
        if self._socket is None:
            return
        said = self._unsent | {name: " ".join(value.split()) for name, value in assignments.items()}
        text = "\n".join(f"{name}={value}" for name, value in said.items())
        try:
            self._socket.sendto(text.encode(errors="replace"), self._address)
        except BlockingIOError:
            self._unsent = {name: value for name, value in said.items() if name not in _EVERY_TIME}
        except OSError as error:
            if not self._complained:
                log.warning("notify.failed", address=self._address.replace("\0", "@", 1), error=str(error))
            self._complained = True
        else:
            self._unsent = {}


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """The watchdog's period, if it is this process that it watches."""
    try:
        microseconds, pid = int(environ.get("WATCHDOG_USEC", "0")), int(environ.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        log.warning("notify.bad_watchdog", usec=environ.get("WATCHDOG_USEC"), pid=environ.get("WATCHDOG_PID"))
        return 0.0
    return microseconds / 1_000_000 if microseconds > 0 and pid == os.getpid() else 0.0

"""The test's side of other processes: start them, talk to them, signal them, and know when they end. All by pidfd."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cpe_daemon.errors import from_code

ROOT = Path(__file__).parent.parent.parent
T = TypeVar("T")


class ChildError(Exception):
    """Something went wrong in a child that is no `CpeError`."""


def until(look: Callable[[], T], what: str, seconds: float = 30.0) -> T:
    """Look again and again until what is seen is true, and return it; fail the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (seen := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        pause.wait(0.02)
    return seen


class Process:
    """Any process of ours, dead or alive.

    Args:
        name: for messages.
        pid: its number.
        pidfd: refers to it whatever becomes of the number; owned.
        log: where its standard error goes.
    """

    def __init__(self, name: str, pid: int, pidfd: int, log: Path) -> None:
        self.name = name
        self.pid = pid
        self.log = log
        self._pidfd = pidfd

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; does nothing to the dead."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, seconds: float = 30.0) -> None:
        """Wait for its end."""
        if not select.select([self._pidfd], [], [], seconds)[0]:
            pytest.fail(f"{self.name} did not end within {seconds:g} s")

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        self.wait()

    def release(self) -> None:
        """Kill it if need be, and let go of it."""
        if self._pidfd >= 0:
            self.kill()
            os.close(self._pidfd)
            self._pidfd = -1

    def usage(self) -> dict[str, int]:
        """What it holds: resident bytes, descriptors, threads."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "rss_bytes": resident,
            "fds": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
        }


class Child(Process):
    """A process forked by the `Zygote`, with a `tests.integration.console.Console` at its other end."""

    def __init__(self, name: str, pid: int, pidfd: int, log: Path, commands: int, answers: int) -> None:
        super().__init__(name, pid, pidfd, log)
        self._commands = commands
        self._answers = answers
        self._rest = b""
        self._said: list[dict[str, Any]] = []
        self._count = 0

    def begin(self, verb: str, **arguments: Any) -> int:
        """Have it do something, and return the number under which `result` awaits the outcome."""
        self._count += 1
        command = {"id": self._count, "do": verb, "with": arguments}
        try:
            os.write(self._commands, json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            pytest.fail(f"{self.name} has ended; see {self.log.name}")
        return self._count

    def result(self, number: int, seconds: float = 40.0) -> Any:
        """Await what was begun.

        Raises:
            CpeError: what it raised.
            ChildError: it raised something else.
        """
        said = self._await(lambda message: message.get("id") == number, f"answer {number}", seconds)
        error = said.get("error")
        if error is None:
            return said["result"]
        if error["code"] is None:
            raise ChildError(f"{self.name}: {error['message']}")
        raise from_code(error["code"], error["message"])

    def ask(self, verb: str, seconds: float = 40.0, **arguments: Any) -> Any:
        """`begin` and `result` in one."""
        return self.result(self.begin(verb, **arguments), seconds)

    def event(self, kind: str, seconds: float = 40.0) -> dict[str, Any]:
        """Await an event that it tells of."""
        return self._await(lambda message: message.get("event") == kind, kind, seconds)

    def release(self) -> None:
        """Kill it if need be, and let go of it."""
        super().release()
        for fd in (self._commands, self._answers):
            if fd >= 0:
                os.close(fd)
        self._commands = self._answers = -1

    def _await(self, wanted: Callable[[Mapping[str, Any]], bool], what: str, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        seen = 0
        while True:
            for index in range(seen, len(self._said)):
                if wanted(self._said[index]):
                    return self._said.pop(index)
            seen = len(self._said)
            left = deadline - time.monotonic()
            if left <= 0:
                pytest.fail(f"{self.name}: no {what} within {seconds:g} s")
            if select.select([self._answers], [], [], left)[0]:
                self._read(what)

    def _read(self, what: str) -> None:
        data = os.read(self._answers, 1 << 20)
        if not data:
            pytest.fail(f"{self.name} ended before its {what}; see {self.log.name}")
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._said += [json.loads(line) for line in lines]


def exit_status(log: Path) -> int | None:
    """With what a forked child ended; None if it was killed."""
    file = _status_file(log)
    return int(file.read_text()) if file.exists() else None


def _status_file(log: Path) -> Path:
    return log.with_suffix(".status")


C = TypeVar("C", bound=Child)


class Zygote:
    """Starts children from `tests.integration.zygote`."""

    def __init__(self, log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("wb") as err:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("CPE_")}
            environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.zygote", str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=err,
            )
        self._channel = ours
        self._channel.settimeout(90)
        self._log = log
        self._await_ready()

    def preload(self, module: str) -> None:
        """Import a module that children to come will need, once for all of them."""
        self._channel.send(json.dumps({"preload": module}).encode())
        self._await_ready()

    def start(self, kind: type[C], name: str, module: str, arguments: Mapping[str, Any], log: Path) -> C:
        """Fork a child that runs ``main(arguments)`` of a module, with a console."""
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        try:
            pid, pidfd = self.fork(module, arguments, log, command_read, answer_write)
        finally:
            os.close(command_read)
            os.close(answer_write)
        return kind(name, pid, pidfd, log, command_write, answer_read)

    def fork(
        self, module: str, arguments: Mapping[str, Any], log: Path, stdin: int | None = None, stdout: int | None = None
    ) -> tuple[int, int]:
        """Fork a child that runs ``main(arguments)`` of a module; return its pid and a pidfd, the caller's to close.

        What it writes to standard error goes to ``log``; its exit status to a file beside that, see `exit_status`.
        """
        request = {"module": module, "arguments": arguments, "status": str(_status_file(log))}
        with log.open("wb") as err, open(os.devnull, "rb") as nothing:
            fds = [nothing.fileno() if stdin is None else stdin, err.fileno() if stdout is None else stdout]
            socket.send_fds(self._channel, [json.dumps(request).encode()], [*fds, err.fileno()])
        reply, received, _, _ = socket.recv_fds(self._channel, 32, 1)
        os.set_inheritable(received[0], False)
        return int(reply), received[0]

    def _await_ready(self) -> None:
        if self._channel.recv(16) != b"ready":
            pytest.fail(f"the zygote ended: {self._log.read_text()}")

    def close(self) -> None:
        """End it, and with it every child that is left."""
        self._channel.close()
        self._process.wait(20)

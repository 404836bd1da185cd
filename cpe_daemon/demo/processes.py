"""The demo's processes: started with their output in a log, watched while they are waited for, ended for certain."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cpe_daemon.demo.memory import Sizes
from cpe_daemon.errors import DeadlineError, PeerLostError
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.wire.messages import FrontReply, StatusReply, StatusRequest

_SETTINGS: Final = "CPE_"
_STOP_SECONDS: Final = 10.0
_SLICE_SECONDS: Final = 0.25
_SHOWN_LINES: Final = 5
_READ_BYTES: Final = 1 << 16


class Process:
    """A child in a session of its own, so that Ctrl-C reaches this process alone, which then ends the child.

    Args:
        name: for messages.
        arguments: to Python.
        log: file for what it writes to standard error.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as stream:
            self._popen = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise if it has ended.

        Raises:
            PeerLostError: with its exit status and the end of its log.
        """
        status = self._popen.poll()
        if status is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
            said = "".join(f"\n  {line}" for line in lines)
            raise PeerLostError(f"{self.name} ended with status {status}; its last words:{said or ' none'}")

    def stop(self) -> None:
        """End it: ask, wait for some seconds, kill."""
        self._ask_to_end()
        try:
            self._popen.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _ask_to_end(self) -> None:
        self._popen.terminate()


class Talker(Process):
    """A process that writes a line of JSON for each that it reads, and ends when there is nothing more to read."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        super().__init__(name, arguments, log)
        self._unread = b""
        self._spoken = False

    def tell(self, question: Mapping[str, Any]) -> None:
        """Ask something; `hear` gives the answer."""
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended: `hear` says how
                self._popen.stdin.write(json.dumps(question).encode() + b"\n")
                self._popen.stdin.flush()

    def hear(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Await a line; ``meanwhile`` is called now and then, and may raise.

        Raises:
            PeerLostError: the process has ended.
            DeadlineError: nothing came within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        stream = self._popen.stdout
        while b"\n" not in self._unread and stream is not None:
            meanwhile()
            if select.select([stream], [], [], _SLICE_SECONDS)[0]:
                some = os.read(stream.fileno(), _READ_BYTES)
                self._unread += some
                if not some:
                    self._popen.wait(_STOP_SECONDS)
                    self.check()
            if time.monotonic() > deadline:
                raise DeadlineError(f"{self.name} said nothing for {seconds:g} s")
        line, _, self._unread = self._unread.partition(b"\n")
        self._spoken = True
        heard: dict[str, Any] = json.loads(line)
        return heard

    def _ask_to_end(self) -> None:
        if not self._spoken:  # it does not listen yet
            self._popen.terminate()
        elif self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()


def start_daemon(runtime_dir: Path, sizes: Sizes, log: Path) -> Process:
    """Start a daemon by ``cpe serve``, with a configuration like configs/demo.yaml."""
    config = runtime_dir / "config.yaml"
    config.write_text(config_text(runtime_dir, sizes))
    return Process("the daemon", ["-m", "cpe_daemon", "serve", "--config", str(config)], log)


def config_text(runtime_dir: Path, sizes: Sizes) -> str:
    """The daemon's configuration, in YAML.

    It listens to nobody over HTTP and expects no engines: this host may have a daemon of its own that does.
    """
    return "\n".join(
        [
            f"runtime_dir: {json.dumps(str(runtime_dir))}",
            f"state_dir: {json.dumps(str(runtime_dir / 'state'))}",
            "arena:",
            f"  size_bytes: {sizes.arena_bytes}",
            "device:",
            f"  slots: {sizes.slots}",
            f"  slot_bytes: {sizes.slot_bytes}",
            "http:",
            '  listen: ""',
            "",
        ]
    )


def await_daemon(endpoint: str, processes: Iterable[Process], seconds: float) -> None:
    """Wait until a daemon answers.

    Raises:
        PeerLostError: one of ``processes`` ended meanwhile.
        DeadlineError: it did not answer within ``seconds``.
    """
    needed = list(processes)
    deadline = time.monotonic() + seconds
    dealer = Dealer(endpoint, FrontReply)
    try:
        while time.monotonic() < deadline:
            for process in needed:
                process.check()
            try:
                dealer.send(StatusRequest(), timeout=_SLICE_SECONDS)
            except PeerLostError:
                continue  # not there yet
            received = dealer.receive(_SLICE_SECONDS)
            if received is not None and isinstance(received[0], StatusReply):
                return
    finally:
        dealer.close()
    raise DeadlineError(f"the daemon did not answer at {endpoint} within {seconds:g} s")

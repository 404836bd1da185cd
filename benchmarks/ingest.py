"""``python -m benchmarks.ingest``: how long a version takes from the trainer's publish call to staged at the daemon.

A daemon (``cpe serve``) and a `Publisher` run as processes of their own, without an engine; beside them the floor, two
bare processes that move, copy and digest the same bytes (`benchmarks.ingest_floor`). The runs of both alternate, and
``ratio`` is of their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from benchmarks import report
from benchmarks.arguments import positive
from benchmarks.models import DENSE
from cpe_daemon.config import FRONT_SOCKET
from cpe_daemon.config.model import IngestConfig
from cpe_daemon.core.types import align
from cpe_daemon.demo.processes import Process, Talker, await_daemon
from cpe_daemon.errors import CpeError, DeadlineError
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.wire.messages import FrontReply, StatusReply, StatusRequest

_START_SECONDS: Final = 120.0
_RUN_SECONDS: Final = 120.0
_MIB: Final = 1 << 20
_TRANSPORTS: Final = ("inline-ipc", "inline-tcp", "landing")
_EPILOG: Final = """\
transports:
  inline-ipc   frames over a unix socket, as a trainer in another container of this host sends them
  inline-tcp   frames over tcp on the loopback device, without CURVE
  landing      a ring of shared memory, as a trainer on this host has it by default

examples:
  python -m benchmarks.ingest --transport landing
  python -m benchmarks.ingest --transport inline-tcp --versions 15
  python -m benchmarks.ingest --transport inline-ipc --quick      # some megabytes, to see that it works

The last line is JSON: bench, transport, bytes, seconds (of each version), floor_seconds (of each run of the floor) and
ratio, of the medians. A shared machine is noisy: more --versions, or several runs, tell more than one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured.

    Attributes:
        transport: how the bytes travel.
        model: a name of `benchmarks.models.DENSE`.
        directory: for sockets and logs; its path has to be short.
    """

    transport: str
    model: str
    directory: Path

    @property
    def landing(self) -> bool:
        """Whether the bytes go through a landing ring."""
        return self.transport == "landing"

    @property
    def tcp(self) -> bool:
        """Whether they go through a tcp socket."""
        return self.transport == "inline-tcp"

    @property
    def terms(self) -> tuple[int, int]:
        """(chunk bytes, credits), which are the daemon's defaults."""
        ingest = IngestConfig()
        if self.landing:
            return ingest.landing_chunk_bytes, ingest.landing_credits
        return ingest.chunk_bytes, ingest.credits

    def config(self) -> dict[str, object]:
        """The daemon's settings."""
        made: dict[str, object] = {
            "runtime_dir": str(self.directory),
            "state_dir": str(self.directory / "state"),
            "arena": {"size_bytes": align(DENSE[self.model].nbytes * 21 // 10 + 16 * _MIB)},
            "device": {"slots": 1, "slot_bytes": _MIB},  # there is no engine
            "retention": {"versions": 0},
            "http": {"listen": ""},
        }
        if self.tcp:
            made["ingest"] = {"insecure": True, "listen": ["tcp://127.0.0.1:0"]}
        return made


@dataclass(slots=True)
class Figures:
    """What was measured: seconds of each run, and those that the publish call itself took."""

    nbytes: int
    seconds: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)


class Ours:
    """A context: a daemon and a trainer are up inside of it, and gone behind it."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _start(self, undo: ExitStack) -> None:
        directory = self._setting.directory
        config = directory / "config.yaml"
        config.write_text(json.dumps(self._setting.config()))  # JSON is YAML
        serve = ["-m", "cpe_daemon", "serve", "--config", str(config)]
        daemon = undo.enter_context(Process("the daemon", serve, directory / "daemon.log"))
        front = f"ipc://{directory / FRONT_SOCKET}"
        await_daemon(front, [daemon], _START_SECONDS)
        command = ["-m", "benchmarks.ingest_trainer", "--model", self._setting.model]
        command += ["--endpoint", _tcp_endpoint(front) if self._setting.tcp else front]
        command += ["--landing"] if self._setting.landing else []
        self._trainer = undo.enter_context(Talker("the trainer", command, directory / "trainer.log"))
        self.nbytes = int(self._trainer.hear(_START_SECONDS)["bytes"])

    def publish(self) -> tuple[float, float]:
        """Publish the next version; return the seconds to staged, and those of the call."""
        self._trainer.tell({})
        heard = self._trainer.hear(_RUN_SECONDS)
        return float(heard["seconds"]), float(heard["returned"])


class Floor:
    """A context like `Ours`, without any of ours in it."""

    def __init__(self, setting: Setting) -> None:
        chunk_bytes, credits = setting.terms
        where = {"inline-ipc": f"ipc://{setting.directory / 'floor.sock'}", "inline-tcp": "tcp://127.0.0.1:*"}
        command = ["-m", "benchmarks.ingest_floor", "--model", setting.model]
        command += ["--endpoint", where.get(setting.transport, "landing")]
        command += ["--chunk-bytes", str(chunk_bytes), "--credits", str(credits)]
        self._talker = Talker("the floor", command, setting.directory / "floor.log")

    def __enter__(self) -> Self:
        self._talker.hear(_START_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._talker.stop()

    def run(self) -> float:
        """Move everything once; return the seconds."""
        self._talker.tell({})
        return float(self._talker.hear(_RUN_SECONDS)["seconds"])


def measure(setting: Setting, versions: int) -> Figures:
    """Take turns: a version, the floor, after one of each that is not counted."""
    with Ours(setting) as ours, Floor(setting) as floor:
        figures = Figures(ours.nbytes)
        ours.publish()
        floor.run()
        for _ in range(versions):
            seconds, returned = ours.publish()
            figures.seconds.append(seconds)
            figures.returned.append(returned)
            figures.floor_seconds.append(floor.run())
    return figures


def _tcp_endpoint(front: str) -> str:
    """Where the daemon listens over tcp, as it says."""
    dealer = Dealer(front, FrontReply)
    try:
        dealer.send(StatusRequest())
        received = dealer.receive(_START_SECONDS)
    finally:
        dealer.close()
    if received is None or not isinstance(received[0], StatusReply):
        raise DeadlineError("the daemon gave no status")
    return next(str(e) for e in received[0].status["daemon"]["endpoints"] if str(e).startswith("tcp://"))


def show(setting: Setting, figures: Figures) -> None:
    """Print the table."""
    chunk_bytes, credits = setting.terms
    rows = [
        (name, report.spread(seconds), report.rate(figures.nbytes, seconds))
        for name, seconds in (
            ("publish to staged", figures.seconds),
            ("floor", figures.floor_seconds),
            ("until publish returned", figures.returned),
        )
    ]
    report.show(
        f"ingest over {setting.transport}: {figures.nbytes / 1e9:.2f} GB, {len(figures.seconds)} versions",
        ("", "median (from, to)", "rate"),
        rows,
        [
            f"ratio {report.ratio(figures.seconds, figures.floor_seconds):.3f};"
            f" chunks of {chunk_bytes / _MIB:g} MiB, {credits} in flight;"
            f" {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table and the line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingest",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--transport", choices=_TRANSPORTS, required=True, help="how the bytes travel; see below")
    parser.add_argument("--model", choices=sorted(DENSE), help="names and shapes (default: 0.6b)")
    parser.add_argument("--versions", type=positive, help="how many are timed, after one that is not (default: 9)")
    parser.add_argument("--quick", action="store_true", help="two versions of a small model: no figures to believe")
    asked = parser.parse_args(arguments)
    model = asked.model or ("small" if asked.quick else "0.6b")
    versions = asked.versions or (2 if asked.quick else 9)
    with tempfile.TemporaryDirectory(prefix="cpe-bench-") as directory:
        setting = Setting(asked.transport, model, Path(directory))
        try:
            figures = measure(setting, versions)
        except CpeError as error:
            parser.exit(1, f"error: {error.message}\n")
    show(setting, figures)
    report.finish(
        report.compared(
            "ingest",
            nbytes=figures.nbytes,
            seconds=figures.seconds,
            floor_seconds=figures.floor_seconds,
            transport=asked.transport,
        )
    )


if __name__ == "__main__":
    main()

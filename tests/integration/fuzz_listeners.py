"""``python -m tests.integration.fuzz_listeners --seconds 600``: attack every listener of two real daemons, for as long.

One daemon takes keys over tcp, the other listens there without (``insecure``). While `attacks` go on at the front over
ipc, tcp and CURVE, at the engines' socket, the hand-off and HTTP, trainers publish versions to engines of both, which
have to arrive bit by bit. Neither daemon may crash, hang, or keep descriptors, threads or memory.

The last line is JSON: seconds, versions, and what was said by listener.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import zmq

from cpe_daemon.core.roles import Role
from cpe_daemon.wire.codec import MAX_HEADER_BYTES
from tests.integration import attacks
from tests.integration.attacks import Attack
from tests.integration.harness import Daemon, Node, Trainer, Worker
from tests.integration.keyring import Keyring
from tests.integration.processes import Zygote, until

RECIPE: Final = {"plain": 6, "nbytes": 64 << 10}
GROWTH_BYTES: Final = 64 << 20
SPARE: Final = 4
"""Descriptors and threads that it may have opened once and for all meanwhile."""

PATIENCE_SECONDS: Final = 60.0
SETTINGS: Final[dict[str, Any]] = {"log__level": "warning", "arena__size_bytes": "128MiB"}


class Served:
    """An engine of a daemon, and the trainer that keeps publishing to it."""

    def __init__(self, node: Node, model: str, **terms: Any) -> None:
        self._worker: Worker = node.engine(model, recipe=RECIPE, model=model)[0]
        self._trainer: Trainer = node.trainer(model=model, **terms)
        self.version = 0

    def publish(self) -> None:
        """Publish a version, and see that it arrived as it is."""
        self.version += 1
        self._trainer.ask("build", recipe=RECIPE, seed=self.version)
        self._trainer.publish_live(self.version, PATIENCE_SECONDS)
        if self._worker.ask("forward", PATIENCE_SECONDS) != self._trainer.ask("digests"):
            raise AssertionError(f"version {self.version} did not arrive as it was published")


class Target:
    """A daemon under attack, and how much it held before."""

    def __init__(self, daemon: Daemon, served: list[Served]) -> None:
        self.daemon = daemon
        self.served = served
        self._before: dict[str, int] = {}
        self._peak = 0
        self._samples: list[int] = []
        self._held: dict[str, int] = {}

    def mark(self) -> None:
        """Take what it holds now for what it may hold in the end."""
        self._before, self._held = self.daemon.usage(), held(self.daemon)

    def look(self) -> None:
        """See that it serves."""
        if not self.daemon.alive:
            raise AssertionError(f"{self.daemon.name} has ended: {self.daemon.said[-2000:]}")
        for served in self.served:
            served.publish()
        resident = self.daemon.usage()["rss_bytes"]
        self._peak = max(self._peak, resident)
        self._samples.append(resident >> 10)

    def judge(self) -> None:
        """See that it has let go of everything, some seconds after the last attack."""
        print(f"{self.daemon.name}: {self._held} before, {held(self.daemon)} now", flush=True)
        for what in ("fds", "threads"):
            most = self._before[what] + SPARE
            until(lambda what=what, most=most: self.daemon.usage()[what] <= most, f"{what} are given back", 30)  # type: ignore[misc]
        grown = self.daemon.usage()["rss_bytes"] - self._before["rss_bytes"]
        print(f"{self.daemon.name}: memory grew by {grown >> 10} KiB, at its most {self._peak >> 20} MiB resident")
        print(f"KiB resident, over time: {self._samples[:: max(1, len(self._samples) // 20)]}")
        if grown > GROWTH_BYTES:
            raise AssertionError(f"{self.daemon.name} has grown by {grown} bytes")
        for wrong in ("Traceback", "message.failed", "never retrieved"):
            if wrong in self.daemon.said:
                raise AssertionError(f"{self.daemon.name} logged {wrong!r}: see {self.daemon.log}")


def held(daemon: Daemon) -> dict[str, int]:
    """Its descriptors by kind."""
    kinds: collections.Counter[str] = collections.Counter()
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        with contextlib.suppress(OSError):
            kinds[os.readlink(f"/proc/{daemon.pid}/fd/{fd}").partition(":[")[0]] += 1
    return dict(kinds)


class Campaign:
    """All attacks at once, each repeated by a thread of its own until told to stop."""

    def __init__(self, by_listener: dict[str, Iterable[Attack]], seed: int) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.said: collections.Counter[str] = collections.Counter()
        self._threads = [
            threading.Thread(target=self._repeat, args=(name, attack, seed + number), name=f"{name}-{number}")
            for number, (name, attack) in enumerate(
                (name, attack) for name, many in by_listener.items() for attack in many
            )
        ]

    def __enter__(self) -> Campaign:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _repeat(self, name: str, attack: Attack, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            try:
                said = attack(rng)
            except (OSError, zmq.ZMQError):
                continue  # cut off
            with self._lock:
                self.said[name] += said


def attack_listeners(nodes: tuple[Node, Node], keys: Keyring, seconds: float, seed: int) -> dict[str, int]:
    """Attack for so long; return what was said by listener. Raises whatever was wrong."""
    by_role = {str(role): keys.client(str(role), role) for role in Role}
    keys.client("served", Role.TRAINER)
    keyed = nodes[0].start_daemon(**keys.settings, **SETTINGS)
    plain = nodes[1].start_daemon(ingest__insecure=True, ingest__listen=["tcp://127.0.0.1:0"], **SETTINGS)
    curve, open_tcp = keyed.tcp_endpoint(), plain.tcp_endpoint()
    targets = (
        Target(
            keyed,
            [
                Served(nodes[0], "here"),
                Served(nodes[0], "there", endpoint=curve, landing=False, **keys.terms("served")),
            ],
        ),
        Target(plain, [Served(nodes[1], "there", endpoint=open_tcp, landing=False)]),
    )
    url = next(e for e in keyed.status()["daemon"]["endpoints"] if e.startswith("http://"))
    sockets = keyed.runtime_dir
    by_listener: dict[str, Iterable[Attack]] = {
        "front over ipc": attacks.on_front(keyed.front, attacks.unix(f"{sockets}/front.sock"), MAX_HEADER_BYTES),
        "front over tcp": attacks.on_front(open_tcp, attacks.tcp(open_tcp), MAX_HEADER_BYTES),
        "front over CURVE": attacks.on_curve(curve, MAX_HEADER_BYTES, by_role),
        "engines": attacks.on_engines(keyed.engines, attacks.unix(f"{sockets}/engines.sock"), MAX_HEADER_BYTES),
        "hand-off": [attacks.raw(attacks.unix(f"{sockets}/handoff.sock"), attacks.handoff)],
        "http": [attacks.raw(attacks.tcp(url), attacks.http)] * 4,
    }
    campaign = Campaign(by_listener, seed)
    began = time.monotonic()
    for target in targets:
        target.look()
        target.mark()
    with campaign:
        while time.monotonic() - began < seconds:
            for target in targets:
                target.look()
    for target in targets:
        target.look()
        target.judge()
    print(f"{sum(served.version for target in targets for served in target.served)} versions arrived meanwhile")
    return dict(campaign.said)


@contextlib.contextmanager
def two_nodes(zygote: Zygote, directory: Path) -> Iterator[tuple[Node, Node]]:
    """Nodes with their runtime directories and logs below ``directory``; its path has to be short."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ("a", "b"):
            (directory / f"logs-{name}").mkdir()
            nodes.append(Node(zygote, directory / name, directory / f"logs-{name}"))
            stack.callback(nodes[-1].close, gracefully=False)
        yield nodes[0], nodes[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFF, help="of the random numbers")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="cpe-fuzz-", dir="/tmp"))
    print(f"seed {options.seed}, logs below {directory}", flush=True)
    wrong = ""
    said: dict[str, int] = {}
    with contextlib.redirect_stdout(sys.stderr), contextlib.closing(Zygote(directory / "zygote.log")) as zygote:
        try:
            with two_nodes(zygote, directory) as nodes:
                said = attack_listeners(nodes, Keyring(directory / "keys"), options.seconds, options.seed)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the result
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
    for name, number in sorted(said.items()):
        print(f"{number:>12,}  {name}")
    print(json.dumps({"fuzz": "listeners", "seconds": options.seconds, "said": said, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

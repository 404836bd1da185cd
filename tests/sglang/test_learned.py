"""What SGLang's loader only copies is copied without it: as many tensors as large models have, to the same bits."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sglang.servers import Server
from tests.sglang.test_servers import engine_of
from tests.vllm.checkpoints import Checkpoint, Checkpoints, many, vary
from tests.vllm.servers import Daemon, Faults, RoomyDaemon, Trainer

TENSORS = 1968
VERSIONS = 6
LEARNING = 2
"""Versions that the loader is watched with."""
TIMES = 5
"""Faster than through the loader, in the fastest updates of both; found to be 10 on two idle cores."""


@pytest.fixture
def roomy(place: Path) -> Iterator[Daemon]:
    runtime_dir = Path(tempfile.mkdtemp(prefix="cpe-", dir="/tmp"))
    state_dir = place / "roomy"
    state_dir.mkdir()
    started = RoomyDaemon(runtime_dir, state_dir)
    started.start()
    yield started
    started.stop()
    shutil.rmtree(runtime_dir, ignore_errors=True)


def test_many_tensors_are_updated_much_faster_and_to_the_same_bits(
    roomy: Daemon, all_faults: Faults, place: Path
) -> None:
    made = Checkpoints(place / "many", many(), adjust=vary)
    family = [made.make(served=False) for _ in range(2)]
    assert len(family[0].tensors) == TENSORS
    updated: dict[str, tuple[list[float], list[dict[str, str]]]] = {}
    for learned in ("on", "off"):
        updated[learned] = updates(roomy, all_faults, place, family, learned)
    (fast, copied), (slow, loaded) = updated["on"], updated["off"]
    assert copied == loaded
    print(f"learned {min(fast[LEARNING:]):.3f} s, by the loader {min(slow):.3f} s")
    assert min(slow) >= TIMES * min(fast[LEARNING:])


def updates(
    daemon: Daemon, faults: Faults, place: Path, family: list[Checkpoint], learned: str
) -> tuple[list[float], list[dict[str, str]]]:
    """Have a server take versions: how long it was loading each, and what its parameters were after each."""
    name = f"many-{learned}"
    environment = {"CPE_LEARNED": learned, "CPE_SGLANG_START": "disk"}
    server = Server(name, daemon, family[0], faults, place, model=name, environment=environment)
    trainer = Trainer(daemon, name)
    seconds, sums = list[float](), list[dict[str, str]]()
    try:
        server.start()
        server.ready()
        for number in range(VERSIONS):
            phases = trainer.publish(family[(number + 1) % 2]).engines[name].phases
            seconds.append(phases["push"] + phases["finish"])
            (rank,) = json.loads(server.call("/weights_checker", {"action": "checksum"}))["ranks"]
            sums.append(rank["checksums"])
        loading = engine_of(daemon, name)["loading"]
        assert loading is None if learned == "off" else (loading["learned"], loading["kept"]) == (TENSORS, {})
    finally:
        trainer.close()
        server.kill()
    return seconds, sums

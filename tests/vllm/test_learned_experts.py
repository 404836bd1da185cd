"""Experts that vLLM packs for the CPU are copied to where it packs them from: as many tensors as large models have."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cpe_daemon.errors import CpeError
from tests.vllm.checkpoints import Checkpoint, Checkpoints, many, vary
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, RoomyDaemon, Server, Trainer

TENSORS = 1968
VERSIONS = 7
TEACHING = 2
"""Versions that the loader is watched with."""


class Held(NamedTuple):
    """What a server holds: digests of its parameters, as vLLM makes them, and what it computes with them."""

    checksums: dict[str, str]
    tokens: list[int]
    logprobs: list[float]


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Daemon]:
    """Each test's own: it keeps what is live of each model."""
    with RoomyDaemon.running(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def versions(place: Path) -> list[Checkpoint]:
    made = Checkpoints(place / "many", many(), adjust=vary)
    found = [made.make(served=False) for _ in range(3)]
    assert len(found[0].tensors) == TENSORS
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.essential)])
def test_many_packed_tensors_are_copied_to_the_bits_that_the_loader_makes(
    roomy: Daemon, all_faults: Faults, place: Path, versions: list[Checkpoint], ranks: int
) -> None:
    with serving(roomy, all_faults, place, versions, ranks, "off") as (server, trainer):
        slow, loaded = update(server, trainer, versions)
    with serving(roomy, all_faults, place, versions, ranks, "on") as (server, trainer):
        fast, copied = update(server, trainer, versions)
        assert copied == loaded
        assert learned(roomy, server) == (TENSORS, {})
        for rank, step in enumerate(["finish", "make_over"][-ranks:]):
            before = held(server)
            all_faults.order(server.engine, rank, step, "fail")
            with pytest.raises(CpeError, match="the test wants this"):
                trainer.begin(versions[rank].tensors).live(timeout=LIVE_SECONDS)
            all_faults.clear()
            assert held(server) == before
            assert learned(roomy, server) == (TENSORS, {}), "what restored it was copied as well"
        _, copied = update(server, trainer, versions)
        assert copied == loaded
    watched = fast[:TEACHING]
    for name, seconds in (("watched", watched), ("learned", fast[TEACHING:]), ("by the loader", slow)):
        middle = statistics.median(seconds)
        print(
            f"{ranks} ranks, {name}: {middle:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), {len(seconds)} versions"
        )


def test_version_that_lacks_a_packed_tensor_leaves_what_was_served(
    roomy: Daemon, all_faults: Faults, place: Path, versions: list[Checkpoint]
) -> None:
    with serving(roomy, all_faults, place, versions, 1, "on") as (server, trainer):
        update(server, trainer, versions)
        before, lacking = held(server), dict(versions[0].tensors)
        del lacking["model.layers.3.mlp.experts.77.up_proj.weight"]
        with pytest.raises(CpeError, match="not all tensors came of"):
            trainer.begin(lacking).live(timeout=LIVE_SECONDS)
        assert held(server) == before
        update(server, trainer, versions)
        assert held(server) == before
        assert learned(roomy, server) == (TENSORS, {})


@contextlib.contextmanager
def serving(
    daemon: Daemon, faults: Faults, place: Path, versions: list[Checkpoint], ranks: int, on: str
) -> Iterator[tuple[Server, Trainer]]:
    """A server that learns its loaders, or does not, and a trainer of its own model."""
    name = f"many-{ranks}-{on}-{len(list(place.glob('many-*')))}"
    environment = {"CPE_LEARNED": on, "CPE_VLLM_START": "disk"}
    server = Server(name, daemon, versions[0], faults, place, ranks=ranks, model=name, environment=environment)
    trainer = Trainer(daemon, name)
    try:
        server.start()
        yield server.ready(), trainer
    finally:
        trainer.close()
        server.kill()


def update(server: Server, trainer: Trainer, versions: list[Checkpoint]) -> tuple[list[float], list[Held]]:
    """Have a server take versions: how long it was loading each, and what it held after each."""
    seconds, found = list[float](), list[Held]()
    for number in range(VERSIONS):
        report = trainer.publish(versions[(number + 1) % len(versions)])
        assert not report.behind
        phases = report.engines[server.engine].phases
        seconds.append(phases["push"] + phases["finish"])
        found.append(held(server))
    return seconds, found


def held(server: Server) -> Held:
    tokens, logprobs = server.complete()  # waits until a server that is paused goes on, as the checksums do not
    checksums = json.loads(server.call("/weight_checker", {"action": "checksum"}))["checksums"]
    return Held(checksums, tokens, logprobs)


def learned(daemon: Daemon, server: Server) -> tuple[int, dict[str, int]]:
    """How many tensors are learned, and why others are not."""
    found: list[dict[str, Any]] = [one for one in daemon.status()["engines"] if one["engine"] == server.engine]
    return found[0]["loading"]["learned"], found[0]["loading"]["kept"]

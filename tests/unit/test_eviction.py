"""Versions that an operator wants to be rid of: they go, unless somebody needs them, all or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner

from cpe_daemon.cli import main
from cpe_daemon.core.admission import History, Used
from cpe_daemon.core.journal import Identity, ModelEntry, State
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.errors import BusyError, MisuseError
from cpe_daemon.push.eviction import evict
from cpe_daemon.wire.messages import Done, EvictRequest
from tests.unit.fake_node import FakeNode, number
from tests.unit.front_door import front_door

ONE, TWO = number(1), number(2)
MISSPELT = number(1, "n")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def ask(node: FakeNode, model: str, run: str = "", n: int = -1) -> str:
    return evict(node.catalogue, node.registry, EvictRequest(model, run, n), node.before)


def here(node: FakeNode) -> dict[str, str]:
    return {str(version.id): str(version.state) for version in node.catalogue if version.contributions}


async def test_misspelt_model_goes_and_its_memory_comes_back() -> None:
    async with FakeNode.running() as node:
        node.worker("a", model="m")
        await node.publish(ONE)
        free = node.arena.free_bytes
        await node.publish(MISSPELT)
        assert node.catalogue.live_models() == ["m", "n"]
        assert ask(node, "n") == f"evicted {MISSPELT}"
        assert (node.catalogue.live_models(), node.arena.free_bytes) == (["m"], free)
        gone = node.catalogue.last(MISSPELT)
        assert gone is not None
        assert gone.state is VersionState.EVICTED
        assert str(gone.error) == "n@r#1 was evicted by an operator"
        assert node.engine("a").content == ONE


async def test_what_an_engine_serves_or_would_be_given_stays() -> None:
    async with FakeNode.running() as node:
        node.worker("a", model="m")
        await node.publish(ONE)
        await node.publish(TWO)
        before = here(node)
        for n in (-1, 2):
            with pytest.raises(MisuseError, match=r"engine 'a' serves m@r#2"):
                ask(node, "m", n=n)
        assert here(node) == before, "all or none"
        assert ask(node, "m", "r", 1) == f"evicted {ONE}"
        assert here(node) == {str(TWO): "live"}


async def test_live_version_stays_while_an_engine_waits_for_its_model() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        worker = node.worker("a", model="m")
        worker.fail("begin")
        await node.idle()
        with pytest.raises(MisuseError, match=r"engine 'a' (takes versions of m|serves m@r#1)"):
            ask(node, "m")
        worker.die()
        assert ask(node, "m") == f"evicted {ONE}"


async def test_what_is_not_here_or_on_its_way_is_refused() -> None:
    async with FakeNode.running(automatic=False) as node:
        with pytest.raises(MisuseError, match="no m is here; there is: none"):
            ask(node, "m")
        staged = node.stage(ONE)
        with pytest.raises(MisuseError, match=r"no m@x#7 is here; there is: m@r#1 \(staged\)"):
            ask(node, "m", "x", 7)
        with pytest.raises(BusyError, match="m@r#1 is staged"):
            ask(node, "m")
        assert staged.state is VersionState.STAGED


LIVE_BEFORE = State({"n": ModelEntry(History("r", {"r": Used(1, b"d" * 16)}), Identity(MISSPELT, b"d" * 16))})


async def test_misspelt_model_that_was_live_before_a_restart_is_forgotten() -> None:
    async with FakeNode.running(found=LIVE_BEFORE) as node:
        changes: list[int] = []
        node.registry.changed = lambda: changes.append(1)
        with pytest.raises(MisuseError, match="no n@r#2 is here"):
            ask(node, "n", "r", 2)
        assert ask(node, "n") == f"forgot {MISSPELT}, which was live before this daemon and is not here"
        assert changes, "so that it is written down"
        assert node.before.models == []
        with pytest.raises(MisuseError, match="no n is here; there is: none"):
            ask(node, "n")


async def test_engine_that_waited_for_what_is_forgotten_serves() -> None:
    async with FakeNode.running(found=LIVE_BEFORE) as node:
        worker, touched = node.worker("a", model="n"), node.worker("b", model="n", touched=True)
        await node.idle()
        assert worker.paused
        ask(node, "n", "r", 1)
        await node.idle()
        assert (worker.paused, touched.paused) == (False, True)
        assert node.states() == {"a": ("current", None), "b": ("unknown", None)}


async def test_what_an_engine_holds_is_not_forgotten() -> None:
    async with FakeNode.running(found=LIVE_BEFORE) as node:
        node.worker("a", model="n", content=MISSPELT, digest=b"d" * 16)
        with pytest.raises(MisuseError, match="engine 'a' holds a version of n: n@r#1 is not forgotten"):
            ask(node, "n")
        assert node.before.models == ["n"]


async def test_what_is_being_read_is_refused() -> None:
    async with FakeNode.running() as node:
        version = await node.publish(ONE)
        with node.catalogue.lease(version), pytest.raises(BusyError, match="is being read"):
            ask(node, "m")
        assert ask(node, "m") == f"evicted {ONE}"


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("polciy", EvictRequest("polciy")),
        ("org/policy@run-7#12", EvictRequest("org/policy", "run-7", 12)),
        ("policy#0", EvictRequest("policy", "", 0)),
    ],
)
def test_command_asks_for_what_was_said(said: str, asked: EvictRequest, runtime_dir: Path) -> None:
    with front_door(f"ipc://{runtime_dir}/front.sock", {EvictRequest: lambda _: Done("evicted it")}) as heard:
        ran = CliRunner().invoke(main, ["evict", said, "--runtime-dir", str(runtime_dir)])
    assert (ran.exit_code, ran.stdout) == (0, "evicted it\n"), ran.output
    assert heard == [asked]


def test_command_without_a_model_is_refused() -> None:
    for said in ("", "#1"):
        assert CliRunner().invoke(main, ["evict", said]).exit_code == 2

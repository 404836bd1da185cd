"""Names that nobody could type or tell apart are refused: by the publisher, and by the daemon whoever says them."""

from __future__ import annotations

import pytest

from cpe_daemon.core.names import check_names
from cpe_daemon.engines.expected import check_hello
from cpe_daemon.errors import MisuseError
from cpe_daemon.publisher import Publisher
from cpe_daemon.wire.messages import PROTOCOL, EngineSpec, WorkerHello
from tests.unit.fake_node import FakeNode

ODD = ["a b", " a", "a\t", "a\n", "a\x1b[2J", "a\u00a0b", "a\u202eb"]


def worker_hello(engine: str = "e", model: str = "") -> WorkerHello:
    return WorkerHello(PROTOCOL, engine, "torch", 0, 1, "i1", model=model)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(MisuseError, match="has no blanks and no control characters"):
        check_names(model=name)
    with pytest.raises(MisuseError, match="run "):
        Publisher("ipc:///none/front.sock", model="m", run=name)
    with pytest.raises(MisuseError, match="engine "):
        check_hello(worker_hello(name))
    with pytest.raises(MisuseError, match="model "):
        check_hello(worker_hello(model=name))


@pytest.mark.parametrize("name", ["", "policy", "Qwen/Qwen3-8B", "run-7.1@night", "modèle", "政策"])
def test_other_names_are_taken(name: str) -> None:
    check_names(model=name, run=name)
    check_hello(worker_hello(model=name))


async def test_daemon_refuses_them_whoever_says_them() -> None:
    async with FakeNode.running() as node:
        for engine in (EngineSpec("a b", "torch"), EngineSpec("e", "torch", model="a b")):
            with pytest.raises(MisuseError, match="blanks"):
                node.registry.expected.check(engine)

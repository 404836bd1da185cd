"""Fixtures: one daemon and a few servers for all tests, because a server takes a minute to start.

Most of that minute a start is imports, one after the other, so servers are started together, each on a core.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.checkpoints import Checkpoint, Checkpoints, dense, tied
from tests.vllm.servers import PYTHON, Daemon, Faults, Server, Trainer, started

HERE = Path(__file__).parent
SECONDS = 600.0
"""For one test, and the start of the servers that it is the first to need."""


def pytest_configure(config: pytest.Config) -> None:
    """Make our marker known."""
    config.addinivalue_line("markers", "essential: with real vLLM servers, and run before every change lands")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give time to start servers, and skip where there is no vLLM."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(SECONDS))
            if (lacks := lacking()) is not None:
                item.add_marker(pytest.mark.skip(reason=lacks))


def lacking() -> str | None:
    """What this host lacks for a vLLM on its CPU; None if nothing."""
    if not PYTHON.exists():
        return "needs .venv-vllm: `make test-vllm` makes it"
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else ["avx2"]
    return None if "avx2" in flags else "this CPU has no AVX2, which vLLM's builds for CPUs need"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints and logs are."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def daemon(place: Path) -> Iterator[Daemon]:
    """The node's daemon; a test that kills it starts it again."""
    with Daemon.running(place) as started:
        yield started


@pytest.fixture(scope="session")
def all_faults(place: Path) -> Faults:
    return Faults(place / "faults")


@pytest.fixture
def faults(all_faults: Faults) -> Iterator[Faults]:
    """What workers are told to do wrong; nothing, when the test is over."""
    yield all_faults
    all_faults.clear()


@pytest.fixture(scope="session")
def family(place: Path) -> list[Checkpoint]:
    """Of the model ``policy``: the first is on servers' disks, the others are published."""
    made = Checkpoints(place / "dense", dense(), (50, 73, 293))
    return [made.make() for _ in range(3)]


@pytest.fixture(scope="session")
def tied_family(place: Path) -> list[Checkpoint]:
    """Of the model ``tied``."""
    made = Checkpoints(place / "tied", tied(), (11, 1))
    return [made.make() for _ in range(2)]


@pytest.fixture(scope="session")
def trainer(daemon: Daemon, family: list[Checkpoint]) -> Iterator[Trainer]:
    """Of the model ``policy``. Its first version is live before servers start."""
    started = Trainer(daemon, "policy")
    started.publish(family[1])
    yield started
    started.close()


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest,
    daemon: Daemon,
    trainer: Trainer,
    family: list[Checkpoint],
    all_faults: Faults,
    place: Path,
) -> Iterator[dict[str, Server]]:
    """Those that the chosen tests use, starting."""
    made = [
        Server("one", daemon, family[0], all_faults, place, own_routes=True, key=daemon.key),
        Server("two", daemon, family[0], all_faults, place, ranks=2),
    ]
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with started(*(server for server in made if server.engine in used)) as starting:
        yield {server.engine: server for server in starting}


@pytest.fixture(scope="session")
def one(servers: dict[str, Server]) -> Server:
    """A server of one worker, with a key, and with our own routes and none for developers."""
    return servers["one"].ready()


@pytest.fixture(scope="session")
def two(servers: dict[str, Server]) -> Server:
    """A server of two workers, with vLLM's routes for developers."""
    return servers["two"].ready()

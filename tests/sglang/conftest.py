"""Fixtures: one daemon and a few servers for all tests, because a server takes a minute to start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sglang.servers import ADMIN_KEY, PYTHON, Server, SglangFaults
from tests.vllm.checkpoints import Checkpoint, Checkpoints, dense, tied, vary
from tests.vllm.servers import Daemon, Faults, Trainer

HERE = Path(__file__).parent
SECONDS = 700.0
"""For one test, and the start of the servers that it is the first to need."""


def pytest_configure(config: pytest.Config) -> None:
    """Know what vLLM's tests are marked with: some of their code is used here."""
    config.addinivalue_line("markers", "essential: of tests/vllm, where it is said")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give time to start servers, and skip where there is no SGLang."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(SECONDS))
            if not PYTHON.exists():
                item.add_marker(pytest.mark.skip(reason="needs .venv-sglang: `make test-sglang` makes it"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints and logs are."""
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="session")
def daemon(place: Path) -> Iterator[Daemon]:
    """The node's daemon; a test that kills it starts it again."""
    runtime_dir = Path(tempfile.mkdtemp(prefix="cpe-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CPE_SGLANG_ADMIN_API_KEY", ADMIN_KEY)
        environment.setenv("CPE_SGLANG_CHECK", "checksum")
        started = Daemon(runtime_dir, place)
        started.start()
        yield started
        started.stop()
    shutil.rmtree(runtime_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def all_faults(place: Path) -> Faults:
    return SglangFaults(place / "faults")


@pytest.fixture
def faults(all_faults: Faults) -> Iterator[Faults]:
    """What workers are told to do wrong; nothing, when the test is over."""
    yield all_faults
    all_faults.clear()


@pytest.fixture(scope="session")
def family(place: Path) -> list[Checkpoint]:
    """Of the model ``policy``: the first is on servers' disks, the others are published."""
    made = Checkpoints(place / "dense", dense(), (30, 195, 227), adjust=vary)
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
def one(
    daemon: Daemon, trainer: Trainer, family: list[Checkpoint], all_faults: Faults, place: Path
) -> Iterator[Server]:
    """A server of one scheduler, which loads nothing from its disk."""
    server = Server("one", daemon, family[0], all_faults, place, options={"--load-format": "dummy"})
    try:
        server.start()
        yield server.ready()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def two(
    daemon: Daemon, trainer: Trainer, family: list[Checkpoint], all_faults: Faults, place: Path
) -> Iterator[Server]:
    """A server of two schedulers, with another version on its disk."""
    server = Server("two", daemon, family[0], all_faults, place, ranks=2)
    try:
        server.start()
        yield server.ready()
    finally:
        server.kill()

"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.integration.harness import Node
from tests.integration.processes import Zygote

_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Where trainers and engine workers are forked from."""
    started = Zygote(tmp_path_factory.mktemp("zygote") / "log")
    yield started
    started.close()


@pytest.fixture
def node(
    zygote: Zygote, no_leaks: None, runtime_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Node]:
    """A node without a daemon yet. All that runs on it ends with the test, and a daemon that lives has to end well."""
    started = Node(zygote, runtime_dir, tmp_path)
    yield started
    started.close(gracefully=not request.node.stash.get(_FAILED, False))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report

"""Fixtures that tests of every room share; what only one room needs stays beside its tests."""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.leaks import Holdings
from tests.unit.virtual_time import VirtualTimeLoop

# A shell that starts a job in the background has it ignore SIGINT, and every process below it: tests that interrupt one
# would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LEAK_WAIT_SECONDS = 30.0
_EXIT_SECONDS = 60.0
_ON_VIRTUAL_TIME = {"test_arrival.py", "test_deadlines.py", "test_retries.py"}
_ON_UVLOOP = {"test_http.py"}
"""What is close to the loop's own transports is tested on the loop that the daemon runs on."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Say which event loop a test runs on."""
    if item.path.name in _ON_VIRTUAL_TIME:
        return {"virtual time": VirtualTimeLoop}
    if item.path.name in _ON_UVLOOP:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Say what keeps this process from ending once all tests have run, and end it as failed."""
    faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """An empty directory for sockets, with a path short enough for them.

    A Unix socket's path has at most 107 bytes, which pytest's tmp_path with a long test name exceeds.
    """
    path = Path(tempfile.mkdtemp(prefix="cpe-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail the test that keeps a file descriptor, a thread or a /dev/shm entry it did not find.

    Name it first in the test's arguments: what is set up after it is also torn down before it looks.
    """
    before = Holdings.take()
    yield
    leaked = before.leaks(_LEAK_WAIT_SECONDS)
    assert not leaked, "not given back: " + ", ".join(leaked)


@functools.cache
def _why_no_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None where they can."""
    import torch

    if torch.version.cuda is None:
        return "needs a GPU: torch here is a build without CUDA"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Ask NVML rather than the CUDA runtime, which would be of no use to a child forked later.
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        warnings.simplefilter("ignore")
        return None if torch.cuda.is_available() else "needs a GPU: none is visible to torch"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none, with the reason."""
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)

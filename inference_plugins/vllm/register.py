"""Makes ``--weight-transfer-config '{"backend": "cpe"}'`` known to vLLM; an entry point of ``vllm.general_plugins``."""

from __future__ import annotations

import logging
from typing import Final

from inference_plugins.vllm.ranks import note

log: Final = logging.getLogger(__name__)

BACKEND: Final = "cpe"


def register() -> None:
    """Register the weight transfer engine; vLLM calls this in each of its processes, and may do so more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    _ask_for_tiles()
    note()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "inference_plugins.vllm.transfer", "CpeWeightTransferEngine"
        )


def _ask_for_tiles() -> None:
    """Ask the kernel for AMX, where a CPU has it: vLLM uses it there without asking, which some kernels punish."""
    import torch

    ask = getattr(torch.cpu, "_init_amx", None)
    if ask is not None and not torch.cuda.is_available():
        ask()

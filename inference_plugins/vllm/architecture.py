"""The shapes of a checkpoint's tensors where none is here to look at, as transformers' model of its configuration says.

That is so for a server that makes its weights up, or has them in files that only unpickling reads.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch

log: Final = logging.getLogger(__name__)


def shapes_by_config(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name; none where checkpoints need not be like transformers' model, or where it has no such model.

    A quantised checkpoint has other tensors by the same names, and transformers itself makes others of the tensors of
    some models, as of experts. Nothing takes memory: the model is made on the meta device.

    Args:
        config: of transformers, as vLLM has it; None: there is none.
    """
    if config is None or getattr(config, "quantization_config", None) or not getattr(config, "architectures", None):
        return {}
    try:
        import transformers

        kind = getattr(transformers, config.architectures[0], None)
        if kind is None or _converts(kind, config):
            return {}
        with torch.device("meta"):
            model = kind(config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception as error:  # task boundary: code of others, without which a worker starts as well
        log.info("transformers does not say the shapes of %s: %r", config.architectures[0], error)
        return {}


def _converts(kind: Any, config: Any) -> bool:
    """Whether transformers makes other tensors of a checkpoint's, or calls them otherwise."""
    if getattr(kind, "_checkpoint_conversion_mapping", None):
        return True
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # before 5 there was none but that
        return False
    return bool(get_checkpoint_conversion_mapping(config.model_type))

"""What a model's files say that vLLM loaded, also of one that it knows by its name on a hub."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from inference_plugins.disk import shapes_on_disk
from inference_plugins.vllm.architecture import shapes_by_config

log: Final = logging.getLogger(__name__)


def shapes(model_config: Any, load_config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of its tensors, by name: as its safetensors have them, or else as its configuration says.

    None if neither can be told.

    Args:
        model_config: as of `directory`.
        load_config: as of `directory`.
    """
    found = shapes_on_disk(place) if (place := directory(model_config, load_config)) else {}
    found = found or shapes_by_config(getattr(model_config, "hf_config", None))
    if not found:
        log.warning("no safetensors of %s are here: the first version's shapes are not compared", model_config.model)
    return found


def directory(model_config: Any, load_config: Any) -> str:
    """The directory of a model's files; "" if there is none here.

    Nothing is downloaded: vLLM has done that. A dummy's weights are not from its files, but have their shapes.

    Args:
        model_config: vLLM's; its model, and which revision of it.
        load_config: vLLM's; where it keeps what it downloads.
    """
    model = str(model_config.model)
    if not model or os.path.isdir(model):
        return model
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return ""
    try:
        return str(
            snapshot_download(
                model,
                revision=getattr(model_config, "revision", None),
                cache_dir=getattr(load_config, "download_dir", None),
                local_files_only=True,
            )
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return ""

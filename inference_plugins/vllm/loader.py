"""What a vLLM worker does with the steps of a round (see `inference_plugins.gated`)."""

from __future__ import annotations

from inference_plugins.gated import GatedLoader


class VllmLoader(GatedLoader):
    """A vLLM worker's."""

    start_setting = "CPE_VLLM_START"

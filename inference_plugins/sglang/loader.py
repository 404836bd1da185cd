"""What an SGLang worker does with the steps of a round (see `inference_plugins.gated`)."""

from __future__ import annotations

from inference_plugins.gated import GatedLoader


class SglangLoader(GatedLoader):
    """An SGLang worker's."""

    start_setting = "CPE_SGLANG_START"

"""Which of SGLang's versions were run, and what of them is asked that may be elsewhere in others.

0.5.23 was run, on the CPU. Others are refused, for an update that only seems to work serves wrong weights; whoever
wants to try sets ``CPE_SGLANG_UNTESTED=1``.
"""

from __future__ import annotations

from typing import Any, Final

from cpe_daemon.errors import EngineError
from inference_plugins.releases import check_release, installed

OLDEST: Final = (0, 5, 23)
NEWEST: Final = (0, 5, 24)
"""Exclusive."""

UNTESTED: Final = "CPE_SGLANG_UNTESTED"


def check_version() -> str:
    """Return SGLang's version.

    Raises:
        EngineError: it is none that was tested, and nobody said to try.
    """
    return check_release("SGLang", sglang_version(), OLDEST, NEWEST, UNTESTED)


def sglang_version() -> str:
    """SGLang's version; "0" if it cannot be told."""
    return installed("sglang")


def derived_error(model: Any) -> str | None:
    """Why SGLang itself would not update a model: it keeps values that it computed of the weights.

    Raises:
        EngineError: this SGLang cannot be asked.
    """
    try:
        from sglang.srt.model_executor.model_runner_components import weight_updater as module

        found: str | None = module._unsupported_derived_weight_cache_error(model)
    except (ImportError, AttributeError) as error:
        raise EngineError(f"SGLang {sglang_version()} updates weights in another way: {error}") from None
    return found

"""The models that benchmarks move, by the name that ``--model`` takes: real names and shapes, random bytes."""

from __future__ import annotations

from typing import Final

from cpe_daemon.demo.architecture import QWEN3_600M, SMALL, Architecture

DENSE: Final[dict[str, Architecture]] = {"0.6b": QWEN3_600M, "small": SMALL}
"""Dense models in bfloat16: Qwen3-0.6B's, and one of some megabytes that is built in the same way."""

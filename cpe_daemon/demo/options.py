"""What may be asked of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

SABOTAGE_ENV: Final = "CPE_DEMO_SABOTAGE"
"""Set, rank 1 of the engine flips a bit of a weight before the comparison: the demo must then fail. For its tests."""


@dataclass(frozen=True, slots=True)
class Options:
    """The demo's options.

    Attributes:
        small: a model of some megabytes.
        scale: fraction of Qwen3-0.6B's size.
        versions: how many are published.
        keep: directory in which checkpoint and logs stay; None: nothing stays.
        as_json: print JSON on standard output in place of a table.
    """

    small: bool = False
    scale: float = 1.0
    versions: int = 3
    keep: Path | None = None
    as_json: bool = False

"""Whether anything is learned at all."""

from __future__ import annotations

import os
from typing import Final

_VARIABLE: Final = "CPE_LEARNED"
_OFF: Final = frozenset({"off", "0", "no", "false"})


def switched_on() -> bool:
    """Whether the environment lets loaders be learned: all but ``CPE_LEARNED=off``."""
    return os.environ.get(_VARIABLE, "").strip().lower() not in _OFF

"""What a plugin does itself while an engine's loader is watched: it is no part of the loader's ways."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final


class _Here(threading.local):
    """Whether this thread is aside."""

    aside = False


_HERE: Final = _Here()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Nothing that this thread does in it is taken for the loader's.

    What it changes has to be the same again when a round ends as it was when the one before did, or all trust ends.
    """
    before, _HERE.aside = _HERE.aside, True
    try:
        yield
    finally:
        _HERE.aside = before


def is_unwatched() -> bool:
    """Whether this thread is in `unwatched`."""
    return _HERE.aside

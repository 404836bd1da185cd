"""What the benchmarks' command lines have in common."""

from __future__ import annotations


def positive(text: str) -> int:
    """Return a number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number

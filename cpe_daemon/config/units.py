"""Sizes and durations as people write them: "256MiB", "1.5GB", "500ms", "5m". Pure, and exact both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

_BYTES: Final[Mapping[str, int]] = {
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SECONDS: Final[Mapping[str, Fraction]] = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
_WRITTEN: Final[tuple[tuple[str, int], ...]] = (
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
)
_QUANTITY: Final = re.compile(r"([+-]?\d+(?:\.\d+)?|[+-]?\.\d+)\s*([a-zA-Z]*)", re.ASCII)


def parse_bytes(value: object) -> int:
    """Return a size in bytes: an int as it is, a string with a unit as "256MiB", "1.5GiB" or "2GB" says.

    Raises:
        ValueError: it is no size, its unit is ambiguous ("4G"), or it is no whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with a unit, such as 256MiB")
    number, unit = _split(value, "size", "256MiB")
    if not unit:
        unit = "b"
    if unit in {"k", "m", "g", "t"}:
        binary, decimal = f"{unit.upper()}iB", f"{unit.upper()}B"
        raise ValueError(f"{value!r} is ambiguous; write {binary} (powers of 1024) or {decimal} (powers of 1000)")
    if unit not in _BYTES:
        raise ValueError(f"{value!r} has no unit that is known here; use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    nbytes = number * _BYTES[unit]
    if nbytes.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return int(nbytes)


def parse_seconds(value: object) -> float:
    """Return a duration in seconds: a number as it is, a string as "500ms", "30s", "5m" or "1h" says.

    Raises:
        ValueError: it is no duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration; write seconds, or a number with a unit, such as 500ms")
    number, unit = _split(value, "duration", "30s")
    if (unit or "s") not in _SECONDS:
        raise ValueError(f"{value!r} has no unit that is known here; use ms, s, m or h")
    return float(number * _SECONDS[unit or "s"])


def format_bytes(nbytes: int) -> str:
    """Write a size so that `parse_bytes` reads the same number back, in the largest unit that stays short."""
    for unit, size in _WRITTEN:
        quarters = Fraction(nbytes * 4, size)
        if abs(nbytes) >= size and quarters.denominator == 1:
            return f"{str(float(quarters / 4)).removesuffix('.0')}{unit}"
    return str(nbytes)


def format_seconds(seconds: float) -> str:
    """Write a duration so that `parse_seconds` reads the same number back."""
    for unit, size in (("h", 3600.0), ("m", 60.0), ("s", 1.0)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    milliseconds = seconds * 1000
    if 0 < seconds < 1 and milliseconds == int(milliseconds):
        return f"{milliseconds:.0f}ms"
    return f"{seconds!r}s"


def _split(value: str, noun: str, example: str) -> tuple[Fraction, str]:
    """Split "1.5GiB" into its exact number and its unit in lower case.

    Raises:
        ValueError: it does not begin with a plain number, or something follows the unit.
    """
    found = _QUANTITY.fullmatch(value.strip())
    if found is None:
        said = "is empty" if not value.strip() else f"{value!r} is not a {noun}"
        raise ValueError(f"{said}; write for example {example}")
    return Fraction(found[1]), found[2].lower()

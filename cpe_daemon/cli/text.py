"""How values read: sizes, durations, and whatever a peer says, without what would steer a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bytes_text(value: object) -> str:
    """Write a size for a person, rounded: "1.50 GiB"."""
    if not isinstance(value, int | float):
        return plain_text(value)
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def seconds_text(value: object) -> str:
    """Write a duration for a person, rounded: "152 ms", "3.2 s", "5 m 10 s", "2 d 3 h"."""
    if not isinstance(value, int | float):
        return plain_text(value)
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    whole = int(value)
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return plain_text(value)


def plain_text(value: object) -> str:
    """Write a value without whatever would steer a terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))


def plain_struct(value: Any) -> Any:
    """Return structs as dicts with all their fields: unlike on the wire, a script finds defaults too."""
    import msgspec

    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    return {name: plain_struct(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value

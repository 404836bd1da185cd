"""Writes what ARCHITECTURE.md shows of the code: the state diagrams, out of the transition tables that decide.

`make docs` runs it; a test fails when the document is behind the tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from cpe_daemon.core.lifecycle import (
    ENGINE_TABLE,
    ROUND_TABLE,
    VERSION_TABLE,
    EngineState,
    RoundState,
    VersionState,
)

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"


def diagram(table: Mapping[tuple[S, E], S], initial: S) -> str:
    """Draw a transition table as a Mermaid state diagram; events between the same two states share an arrow."""
    arrows: dict[tuple[S, S], list[str]] = {}
    for (state, event), after in table.items():
        arrows.setdefault((state, after), []).append(str(event))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {initial}"]
    lines += [f"    {state} --> {after}: {' / '.join(events)}" for (state, after), events in arrows.items()]
    final = {after for _, after in arrows} - {state for state, _ in arrows}
    lines += [f"    {state} --> [*]" for state in sorted(final)]
    return "\n".join([*lines, "```"])


DIAGRAMS = {
    "version": diagram(VERSION_TABLE, VersionState.RECEIVING),
    "engine": diagram(ENGINE_TABLE, EngineState.UNKNOWN),
    "round": diagram(ROUND_TABLE, RoundState.PREFETCHING),
}


def generated(text: str) -> str:
    """Return a document with every generated part made anew.

    Raises:
        ValueError: a part has no place in it.
    """
    for name, drawn in DIAGRAMS.items():
        begin, end = f"<!-- generated: {name} -->", "<!-- /generated -->"
        place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for the {name} diagram: {begin} ... {end}")
        text = place.sub(f"{begin}\n{drawn}\n{end}", text)
    return text


if __name__ == "__main__":
    before = ARCHITECTURE.read_text()
    after = generated(before)
    if after != before:
        ARCHITECTURE.write_text(after)
    sys.stdout.write(f"{ARCHITECTURE.name}: {'written' if after != before else 'current'}\n")

"""What messages report: an error, and how a version came to be live. Immutable; they travel inside messages."""

from __future__ import annotations

import msgspec

from cpe_daemon.core.types import VersionId


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels: the stable code of `cpe_daemon.errors` and one line for a person."""

    code: str
    message: str


class EngineReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a round did to one engine. ``phases`` are seconds by phase; ``gigabytes_per_second`` is over the push."""

    outcome: str
    phases: dict[str, float] = {}
    nbytes: int = 0
    gigabytes_per_second: float = 0.0
    error: ErrorInfo | None = None


class VersionReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a version came to be live on a node. Seconds are wall time at the daemon."""

    version: VersionId
    nbytes: int
    tensors: int
    stage_seconds: float = 0.0
    push_seconds: float = 0.0
    engines: dict[str, EngineReport] = {}

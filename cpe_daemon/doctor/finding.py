"""What a check says: a verdict, what it found, and the mend."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

GIB: Final = 1 << 30
MIB: Final = 1 << 20


class Verdict(StrEnum):
    """How things stand with one point."""

    OK = "ok"
    WARN = "warn"
    """It works, but slower or less safely than it could."""
    FAIL = "fail"
    """The daemon, or what it is for, does not work like this."""
    SKIP = "skip"
    """It does not apply here, or cannot be found out."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one check says, before `cpe_daemon.doctor.run` puts its name to it."""

    verdict: Verdict
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A check's judgement.

    Args:
        name: of the check.
        group: of checks that it belongs to.
        verdict: how things stand.
        found: what there is, and why that matters; for a skipped check, why it was skipped.
        mend: what to do; empty where there is nothing to do.
    """

    name: str
    group: str
    verdict: Verdict
    found: str
    mend: str = ""


def ok(found: str) -> Judgement:
    """All is well."""
    return Judgement(Verdict.OK, found)


def warn(found: str, mend: str) -> Judgement:
    """It works, and could be better."""
    return Judgement(Verdict.WARN, found, mend)


def fail(found: str, mend: str) -> Judgement:
    """It does not work."""
    return Judgement(Verdict.FAIL, found, mend)


def skip(why: str, mend: str = "") -> Judgement:
    """There is nothing to judge."""
    return Judgement(Verdict.SKIP, why, mend)


def worst(judgements: list[Judgement], well: str) -> Judgement:
    """Join what was found at several places: the gravest verdict, all that is not well, every mend once.

    Args:
        judgements: of the places; empty if all is well.
        well: what to say then.
    """
    if not judgements:
        return ok(well)
    gravity = (Verdict.FAIL, Verdict.WARN, Verdict.SKIP, Verdict.OK)
    verdict = min((one.verdict for one in judgements), key=gravity.index)
    found = "; ".join(dict.fromkeys(one.found for one in judgements))
    mends = dict.fromkeys(one.mend for one in judgements if one.mend)
    return Judgement(verdict, found, "; ".join(mends))


def gib(nbytes: float) -> str:
    """Write a size for a person: "4.0 GiB", or in MiB where that says more."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"


def listed(names: list[str] | list[int], most: int = 8) -> str:
    """Write a list for a person, cut where nobody would read on."""
    shown = ", ".join(str(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown

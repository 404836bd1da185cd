"""What becomes of a version whose round is over: the rule, as one pure function."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What is done with a version that was pushed."""

    LIVE = "live"
    TAKE_BACK = "take_back"  # engines that took it get back what they held
    NOT_TAKEN = "not_taken"


def judge_push(*, took: int, failed: int, all_or_none: bool, returnable: bool) -> Verdict:
    """Decide.

    Args:
        took: engines that took the version whole.
        failed: engines of the round that did not.
        all_or_none: a version that some engines did not take shall be in none.
        returnable: everything that those which took it held before can be pushed again.

    Returns:
        Live also where there was no engine at all: the first that attaches gets it. What cannot be taken back stays
        where it is, and is live: an engine that serves a version which has failed would be worse.
    """
    if not failed:
        return Verdict.LIVE
    if not took:
        return Verdict.NOT_TAKEN
    return Verdict.TAKE_BACK if all_or_none and returnable else Verdict.LIVE

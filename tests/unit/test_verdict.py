"""What becomes of a version whose round is over."""

from __future__ import annotations

import pytest

from cpe_daemon.core.verdict import Verdict, judge_push


@pytest.mark.parametrize("all_or_none", [True, False])
@pytest.mark.parametrize("returnable", [True, False])
@pytest.mark.parametrize("took", [0, 1, 3])
@pytest.mark.parametrize("failed", [0, 1, 3])
def test_verdict(took: int, failed: int, all_or_none: bool, returnable: bool) -> None:
    verdict = judge_push(took=took, failed=failed, all_or_none=all_or_none, returnable=returnable)
    if failed and not took:
        assert verdict is Verdict.NOT_TAKEN
    elif failed and all_or_none and returnable:
        assert verdict is Verdict.TAKE_BACK
    else:
        assert verdict is Verdict.LIVE

"""``python -m benchmarks.push --rollback``: what it costs to bring the version back that was live before.

A rollback is a push of bytes that are here, so it is measured beside the pushes of the same run, by the daemon's own
seconds of both. Every push is followed by a rollback, and the next version by the one after it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.bystanders import Bystanders, remark
from benchmarks.host import Host, Setting, Weights

_WARM_UPS = 2


def run(setting: Setting, directory: Path, updates: int) -> None:
    """Measure and print, a table and the last line.

    Raises:
        CpeError: something failed; or the engine did not hold the version before after a rollback, bit by bit.
    """
    bystanders, weights = Bystanders(), Weights(setting.architecture)
    pushes: list[float] = []
    rollbacks: list[float] = []
    with Host(replace(setting, retained=1), directory) as host:
        host.update(weights)
        for measured in range(-_WARM_UPS, updates):
            pushed, back = host.update(weights), host.roll_back()
            if measured >= 0:
                pushes.append(pushed.push_seconds)
                rollbacks.append(back.push_seconds)
        before = host.update(weights).version.number
        expected = host.expected(weights)
        host.update(weights)
        host.roll_back()
        host.check_held(expected, before)
    others_share = bystanders.share()
    ratio = report.ratio(rollbacks, pushes)
    _show(setting, weights.nbytes, pushes, rollbacks, others_share)
    report.finish(
        {
            "bench": "push-rollback",
            "device": "shm",
            "model": setting.model,
            "bytes": weights.nbytes,
            "seconds": report.rounded(pushes),
            "rollback_seconds": report.rounded(rollbacks),
            "rollback_ratio": round(ratio, 4),
            "others_share": round(others_share, 4),
        }
    )


def _show(setting: Setting, nbytes: int, pushes: list[float], rollbacks: list[float], others_share: float) -> None:
    report.show(
        f"Push and rollback of {nbytes / 1e9:.3f} GB ({setting.model}, bfloat16) on shm",
        ("", "seconds", "rate", "ratio"),
        [
            ("push, staged to live", report.spread(pushes), report.rate(nbytes, pushes), "1.00"),
            (
                "rollback, to live again",
                report.spread(rollbacks),
                report.rate(nbytes, rollbacks),
                f"{report.ratio(rollbacks, pushes):.2f}",
            ),
        ],
        notes=[
            f"medians of {len(pushes)}, with the least and the most; the engine then held the version before, bit by"
            " bit",
            remark(others_share),
        ],
    )

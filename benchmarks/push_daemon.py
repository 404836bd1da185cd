"""A daemon whose metrics and logs are accounted for, or taken out: ``python -m benchmarks.push_daemon MODE serve ...``.

``counted`` is ``cpe serve`` with a meter around every call of a metric, of a log event and of what is shown to a
scraper; after each push it prints, as a line of JSON, the seconds of processor time that these took during it.
``blind`` is ``cpe serve`` in which metrics and the tallies of stages do nothing; its configuration turns its logs off.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from cpe_daemon.cli import main as cpe
from cpe_daemon.core.tally import Tally
from cpe_daemon.daemon.accounts import Accounts
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.versions import Version
from cpe_daemon.wire.reports import VersionReport

_INSTRUMENTS: Final[tuple[tuple[type, str], ...]] = (
    (Counter, "inc"),
    (Gauge, "set"),
    (Gauge, "inc"),
    (Gauge, "dec"),
    (Histogram, "observe"),
    (MetricWrapperBase, "labels"),
)
_METERED: Final[tuple[tuple[str, type, str], ...]] = (
    *(("metrics", owner, name) for owner, name in _INSTRUMENTS),
    ("metrics", Metrics, "count_protocol_error"),
    ("metrics", Metrics, "count_version"),
    ("metrics", Metrics, "observe_phases"),
    ("metrics", Metrics, "keep_engines"),
    ("metrics", Tally, "begin"),
    ("metrics", Tally, "end"),
    ("scrapes", Metrics, "encode"),
    ("scrapes", Accounts, "_readings"),
    ("logs", structlog.BoundLoggerBase, "_proxy_to_logger"),
)


class Meter:
    """Seconds of processor time, and calls, by kind; a call within another counts as part of that."""

    def __init__(self) -> None:
        self.seconds = {kind: 0.0 for kind, _, _ in _METERED}
        self.calls = dict.fromkeys(self.seconds, 0)
        self._inside = threading.local()

    def around(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        @functools.wraps(call)
        def metered(*arguments: Any, **terms: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return call(*arguments, **terms)
            self._inside.yes = True
            began = time.thread_time()
            try:
                return call(*arguments, **terms)
            finally:
                self.seconds[kind] += time.thread_time() - began
                self.calls[kind] += 1
                self._inside.yes = False

        return metered


def count() -> None:
    """Put the meter in, and have it read after every push."""
    meter = Meter()
    for kind, owner, name in _METERED:
        setattr(owner, name, meter.around(kind, getattr(owner, name)))
    push = Pusher._push

    @functools.wraps(push)
    async def counted(self: Pusher, version: Version, *arguments: Any, **terms: Any) -> VersionReport:
        seconds, calls, began = dict(meter.seconds), dict(meter.calls), time.monotonic()
        report = await push(self, version, *arguments, **terms)
        line = {
            "version": version.id.number,
            "push_seconds": time.monotonic() - began,
            "seconds": {kind: value - seconds[kind] for kind, value in meter.seconds.items()},
            "calls": {kind: value - calls[kind] for kind, value in meter.calls.items()},
        }
        print(json.dumps(line), flush=True)
        return report

    Pusher._push = counted  # type: ignore[method-assign]


def blind() -> None:
    """Have instruments and tallies do nothing."""

    def nothing(*_: object, **__: object) -> None:
        return None

    def itself(instrument: object, *_: object, **__: object) -> object:
        return instrument

    for owner, name in (*_INSTRUMENTS, (Tally, "begin"), (Tally, "end")):
        setattr(owner, name, itself if name == "labels" else nothing)


def main() -> None:
    """Run ``cpe`` in a mode."""
    modes = {"counted": count, "blind": blind}
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        sys.exit(f"usage: python -m benchmarks.push_daemon {'|'.join(modes)} serve ...")
    modes[sys.argv.pop(1)]()
    cpe()


if __name__ == "__main__":
    main()

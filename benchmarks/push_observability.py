"""What metrics and logs cost of a push: two hosts side by side, one with them and one without, that push in turn.

The one logs at info in JSON and is scraped every second, fifteen times as often as deploy/prometheus/scrape.yml has it;
the other logs errors only, and its metrics do nothing. Two copies of one program differ by more than that costs, so it
is also accounted for directly: the processor time in every call of a metric and of a log event during a push, and that
of a scrape.
"""

from __future__ import annotations

import http.client
import statistics
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks import report
from benchmarks.bystanders import Bystanders, remark
from benchmarks.host import START_SECONDS, Host, Setting, Weights
from cpe_daemon.errors import ConfigError

_WARM_UPS: Final = 2
_EVERY_SECONDS: Final = 1.0
_USUAL_SECONDS: Final = 15.0
"""Between two scrapes, as deploy/prometheus/scrape.yml has it."""

_SCRAPE_SECONDS: Final = 5.0
_SCRAPES: Final = 50


@dataclass(slots=True)
class Costs:
    """What was measured: pushes with and without, in turn, and what was counted in those with."""

    seconds: list[float] = field(default_factory=list)
    without_seconds: list[float] = field(default_factory=list)
    counted: list[dict[str, Any]] = field(default_factory=list)
    scrapes: int = 0
    """Scrapes while pushes were measured."""

    scrape_seconds: float = 0.0
    """Processor time of the daemon for one scrape."""

    @property
    def differences(self) -> list[float]:
        """By pair, how much longer the push with them took, as a fraction."""
        return [ours / theirs - 1.0 for ours, theirs in zip(self.seconds, self.without_seconds, strict=True)]

    def share(self, kind: str) -> float:
        """The median share of the pushes' seconds that calls of a kind took."""
        shares: list[float] = [line["seconds"][kind] / line["push_seconds"] for line in self.counted]
        return statistics.median(shares)


class Scraper:
    """A context in which a daemon's metrics are asked for every second; its end raises what kept it from that.

    Args:
        url: of its listener.
    """

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url).netloc
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper")
        self._error: OSError | http.client.HTTPException | None = None
        self.count = 0
        """Scrapes that were answered."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise ConfigError(f"scraping failed after {self.count} times, so nothing was compared: {self._error!r}")

    def once(self) -> None:
        """Ask once.

        Raises:
            OSError: nobody answers.
            HTTPException: it is no answer, or another one than metrics.
        """
        connection = http.client.HTTPConnection(self._address, timeout=_SCRAPE_SECONDS)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            answer.read()
            if answer.status != http.HTTPStatus.OK:
                raise http.client.HTTPException(f"status {answer.status}")
            self.count += 1
        finally:
            connection.close()

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            try:
                self.once()
            except (OSError, http.client.HTTPException) as error:
                self._error = error
                return


def run(setting: Setting, directory: Path, updates: int) -> None:
    """Measure, and print."""
    bystanders, weights = Bystanders(), Weights(setting.architecture)
    logs = {"level": "info", "format": "json"}
    seen = replace(setting, more={"http": {"listen": "127.0.0.1:0"}, "log": logs})
    unseen = replace(setting, more={"log": {"level": "error"}})
    with (
        Host(seen, directory / "with", ("-m", "benchmarks.push_daemon", "counted", "serve")) as ours,
        Host(unseen, directory / "without", ("-m", "benchmarks.push_daemon", "blind", "serve")) as theirs,
    ):
        costs = _measure(ours, theirs, weights, updates)
    others_share = bystanders.share()
    _show(setting, costs, weights.nbytes, others_share)
    report.finish(
        {
            "bench": "push-observability",
            "device": "shm",
            "model": setting.model,
            "bytes": weights.nbytes,
            "seconds": report.rounded(costs.seconds),
            "without_seconds": report.rounded(costs.without_seconds),
            "difference": round(statistics.median(costs.differences), 5),
            "difference_quartiles": [round(value, 5) for value in _quartiles(costs.differences)],
            "metrics_share": round(costs.share("metrics"), 6),
            "logs_share": round(costs.share("logs"), 6),
            "scrapes": costs.scrapes,
            "scrape_seconds": round(costs.scrape_seconds, 6),
            "share": round(_total(costs), 6),
            "others_share": round(others_share, 4),
        }
    )


def _measure(ours: Host, theirs: Host, weights: Weights, updates: int) -> Costs:
    costs = Costs()
    with Scraper(_url(ours)) as scraper:
        for number in range(_WARM_UPS + updates):
            first, second = (ours, theirs) if number % 2 else (theirs, ours)
            reports = {host: host.update(weights) for host in (first, second)}
            line = ours.daemon.hear(START_SECONDS)
            if number >= _WARM_UPS:
                costs.seconds.append(reports[ours].push_seconds)
                costs.without_seconds.append(reports[theirs].push_seconds)
                costs.counted.append(line)
    costs.scrapes = scraper.count
    began = _processor_seconds(ours.daemon.pid)
    for _ in range(_SCRAPES):
        scraper.once()
    costs.scrape_seconds = (_processor_seconds(ours.daemon.pid) - began) / _SCRAPES
    return costs


def _show(setting: Setting, costs: Costs, nbytes: int, others_share: float) -> None:
    low, high = _quartiles(costs.differences)
    scrape = costs.scrape_seconds
    calls = {kind: statistics.median([line["calls"][kind] for line in costs.counted]) for kind in ("metrics", "logs")}
    report.show(
        f"Push of {nbytes / 1e9:.3f} GB ({setting.model}) on shm, with and without metrics and logs",
        ("", "staged to live"),
        [
            ("with: logs at info in JSON, scraped every second", report.spread(costs.seconds)),
            ("without", report.spread(costs.without_seconds)),
            (
                "difference, by pair",
                f"{statistics.median(costs.differences):+.2%} (half of them {low:+.2%} to {high:+.2%})",
            ),
        ],
    )
    report.show(
        "Accounted for, as processor time",
        ("", "calls a push", "share of a push"),
        [
            ("metrics", f"{calls['metrics']:g}", f"{costs.share('metrics'):.3%}"),
            ("logs", f"{calls['logs']:g}", f"{costs.share('logs'):.3%}"),
            (f"a scrape of {scrape * 1e3:.1f} ms every {_USUAL_SECONDS:g} s", "", f"{scrape / _USUAL_SECONDS:.3%}"),
            ("all", "", f"{_total(costs):.3%}"),
            ("all, with a scrape every second", "", f"{_total(costs, every=_EVERY_SECONDS):.3%}"),
        ],
        notes=[
            f"medians of {len(costs.seconds)} pushes, {costs.scrapes} scrapes; how the hosts wander: first table",
            remark(others_share),
        ],
    )


def _total(costs: Costs, *, every: float = _USUAL_SECONDS) -> float:
    """The share of a push that all of it takes, scrapes in so many seconds included."""
    return costs.share("metrics") + costs.share("logs") + costs.scrape_seconds / every


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _url(host: Host) -> str:
    """Where a host's daemon shows its metrics.

    Raises:
        ConfigError: nowhere.
    """
    urls = [str(endpoint) for endpoint in host.status()["daemon"]["endpoints"]]
    found = next((url for url in urls if url.startswith("http://")), None)
    if found is None:
        raise ConfigError(f"the daemon shows its metrics nowhere: it listens at {', '.join(urls)}")
    return found


def _processor_seconds(pid: int) -> float:
    """What all threads of a process have had of the processors, to the nanosecond: its clock, as Linux numbers them."""
    return time.clock_gettime(~pid << 3 | 2)

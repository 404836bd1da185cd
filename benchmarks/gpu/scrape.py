"""What a daemon's metrics say: read before and after, the difference is what lay between."""

from __future__ import annotations

import http.client
import re
import urllib.parse
from typing import Final

_SECONDS: Final = 10.0
_SAMPLE: Final = re.compile(r"^(?P<name>\w+)(\{(?P<labels>.*)\})? (?P<value>\S+)", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')

Sample = tuple[str, frozenset[tuple[str, str]]]
"""A metric's name and its labels."""


class Readings:
    """All samples of one scrape.

    Args:
        text: in the exposition format.
    """

    def __init__(self, text: str) -> None:
        self.samples: dict[Sample, float] = {}
        for found in _SAMPLE.finditer(text):
            labels = frozenset((name, value) for name, value in _LABEL.findall(found["labels"] or ""))
            self.samples[found["name"], labels] = float(found["value"])

    def since(self, before: Readings, name: str, by: str, **where: str) -> dict[str, float]:
        """Return how much the samples of a metric grew, by the value of the label ``by``.

        Args:
            before: an earlier scrape.
            name: of the metric.
            by: a label.
            where: other labels that a sample must have.
        """
        grown: dict[str, float] = {}
        for (metric, labels), value in self.samples.items():
            if metric == name and where.items() <= labels:
                key = dict(labels).get(by, "")
                grown[key] = grown.get(key, 0.0) + value - before.samples.get((metric, labels), 0.0)
        return grown


def scrape(url: str) -> Readings:
    """Ask a daemon's listener for its metrics."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return Readings(connection.getresponse().read().decode())
    finally:
        connection.close()

"""What there is to know of one metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric.

    Attributes:
        name: as Prometheus knows it; a counter's ends in ``_total``.
        kind: what its values mean.
        text: what is measured, in a sentence.
        labels: names of its labels.
        panel: title of the panel that shows it, in deploy/grafana/cpe-daemon.json.
        alerts: that ask for it, in deploy/prometheus/alerts.yml.
        hint: what to make of it.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    panel: str = ""
    alerts: tuple[str, ...] = ()
    hint: str = ""

    @property
    def unit(self) -> str:
        """The unit of its values, by its name; "" if it counts things."""
        base = self.name.removesuffix("_total")
        return next((unit for unit in ("bytes", "seconds") if base.endswith(f"_{unit}")), "")

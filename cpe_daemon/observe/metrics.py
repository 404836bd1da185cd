"""The daemon's metrics, out of the `inventory`, in a registry of their own.

Two kinds: what is counted as it happens has an instrument here; what mirrors the state of a room is read when somebody
asks (`Readings`), so that nobody has to keep it current. Neither costs anything per chunk or bucket.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from cpe_daemon.errors import CODES
from cpe_daemon.observe.instrument import Instrument
from cpe_daemon.observe.inventory import INSTRUMENTS
from cpe_daemon.observe.labels import ROLLBACKS, SOCKETS

_DURATION: Final = "cpe_update_duration_seconds"
_LAG: Final = "cpe_loop_lag_seconds"
_UPDATE_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds: from a resume of some milliseconds to the receiving of a large model over a slow network."""

_LAG_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

MAX_MODELS: Final = 64
MAX_ENGINES: Final = 1024
OTHER: Final = "(other)"
"""The model of versions that failed before any version of their model was staged: its name may be anything."""


class Readings:
    """Values read from the rooms at one moment, by the instrument's name."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[str, ...], float]] = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        """Add one value, with its labels in the inventory's order.

        Raises:
            KeyError: the inventory has no such instrument.
            ValueError: it has other labels.
        """
        if len(labels) != len(INSTRUMENTS[name].labels):
            raise ValueError(f"{name} has labels {INSTRUMENTS[name].labels}, not {labels}")
        self.values.setdefault(name, {})[labels] = value

    def families(self) -> Iterator[Metric]:
        """The values as prometheus_client has them."""
        for name, samples in self.values.items():
            instrument = INSTRUMENTS[name]
            kind = CounterMetricFamily if instrument.kind == "counter" else GaugeMetricFamily
            family = kind(name, instrument.text, labels=instrument.labels)
            for labels, value in samples.items():
                family.add_metric(labels, value)
            yield family


class Metrics:
    """Every instrument that counts as things happen, of one daemon. Any thread may use prometheus_client's.

    Attributes:
        registry: what prometheus_client keeps.
        protocol_errors: by ``socket``.
        failures: versions that failed, by the ``code`` of their error.
        engine_failures: engines that a round dropped, by the ``code`` of their error.
        rollbacks: versions that were taken back, by the ``cause``.
        rounds: engines' parts in rounds, by ``outcome``.
        update_duration: see `observe_phases`.
        loop_lag: see `observe_lag`.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # they double the samples, and nothing of ours asks for them
        self.registry = CollectorRegistry()
        self._counters: list[Counter] = []
        self.protocol_errors = self._counter("cpe_protocol_errors_total", SOCKETS)
        self.failures = self._counter("cpe_failures_total", CODES)
        self.engine_failures = self._counter("cpe_engine_failures_total", CODES)
        self.rounds = self._counter("cpe_rounds_total", ("updated", "failed"))
        self.rollbacks = self._counter("cpe_rollbacks_total", ROLLBACKS)
        self._versions = self._counter("cpe_versions_total")
        self._went_live = Gauge(**self._terms("cpe_live_version_timestamp_seconds"))
        self.loop_lag = Histogram(**self._terms(_LAG), buckets=_LAG_BUCKETS)
        self.update_duration = Histogram(**self._terms(_DURATION), buckets=_UPDATE_BUCKETS)
        self._durations: dict[tuple[str, str, str], _Sum] = {}
        self._lag = _Sum()
        self._models = _Recent(MAX_MODELS, self._forget_model)
        self._engines = _Recent(MAX_ENGINES, self._forget_engine)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _terms(self, name: str) -> dict[str, Any]:
        instrument: Instrument = INSTRUMENTS[name]
        return {
            "name": name,
            "documentation": instrument.text,
            "labelnames": instrument.labels,
            "registry": self.registry,
        }

    def _counter(self, name: str, known: Iterable[str] = ()) -> Counter:
        """A counter that begins with 0 for every value of its label that is ``known``: a rate needs two samples."""
        made = Counter(**self._terms(name))
        for value in known:
            made.labels(value)
        self._counters.append(made)
        return made

    # --- counting ----------------------------------------------------------------------------------------------------

    def count_protocol_error(self, socket: str) -> None:
        """Count a refused message; fits the ``on_protocol_error`` of `cpe_daemon.links`."""
        self.protocol_errors.labels(socket=socket).inc()

    def count_version(self, model: str, outcome: str) -> None:
        """Count a version that went ``live`` or ``failed``."""
        if outcome == "live":
            self._went_live.labels(model=model).set(time.time())
            self._models.use(model)
        self._versions.labels(model=model if model in self._models else OTHER, outcome=outcome).inc()

    def observe_phases(self, model: str, engine: str, phases: Mapping[str, float]) -> None:
        """Record seconds by phase of one engine's part in an update; ``engine`` is "" for phases of the node."""
        self._models.use(model)
        if engine:
            self._engines.use(engine)
        for phase, seconds in phases.items():
            self._durations.setdefault((phase, model, engine), _Sum()).add(seconds)
            self.update_duration.labels(phase, model, engine).observe(seconds)

    def observe_lag(self, seconds: float) -> None:
        """Record by how much the event loop was late."""
        self._lag.add(seconds)
        self.loop_lag.observe(seconds)

    def keep_engines(self, names: Collection[str]) -> None:
        """Forget all series of every other engine."""
        self._engines.keep(names)

    def _forget_engine(self, engine: str) -> None:
        self._forget_durations([labels for labels in self._durations if labels[2] == engine])

    def _forget_model(self, model: str) -> None:
        self._forget_durations([labels for labels in self._durations if labels[1] == model])
        with contextlib.suppress(KeyError):
            self._went_live.remove(model)
        for outcome in ("live", "failed"):
            with contextlib.suppress(KeyError):
                self._versions.remove(model, outcome)

    def _forget_durations(self, gone: Iterable[tuple[str, str, str]]) -> None:
        for labels in gone:
            del self._durations[labels]
            self.update_duration.remove(*labels)

    # --- showing -----------------------------------------------------------------------------------------------------

    def encode(self, readings: Readings, accept: str) -> tuple[bytes, str]:
        """Write everything down; takes milliseconds, in any thread.

        Args:
            readings: of this moment.
            accept: the request's header; chooses between Prometheus's text and OpenMetrics.

        Returns:
            The text, and its content type.
        """
        encoder, content_type = choose_encoder(accept)
        return encoder(_Together(self.registry, readings)), content_type

    def snapshot(self, readings: Readings | None = None) -> dict[str, float]:
        """Return every counter of ours by name and labels, as ``cpe_rounds_total{outcome="updated"}``.

        Of histograms, sum and count. What mirrors state is left out: whoever shows this shows the state itself. Takes a
        tenth of the time of `encode`, since it is made on the event loop.
        """
        values: dict[str, float] = {}
        for counter in self._counters:
            for family in counter.collect():
                values.update({sample.name + _labels(sample.labels): sample.value for sample in family.samples})
        for name, samples in (readings or Readings()).values.items():
            instrument = INSTRUMENTS[name]
            if instrument.kind == "counter":
                values.update(
                    {
                        name + _labels(dict(zip(instrument.labels, labels, strict=True))): value
                        for labels, value in samples.items()
                    }
                )
        for (phase, model, engine), total in self._durations.items():
            values |= total.named(_DURATION, {"phase": phase, "model": model, "engine": engine})
        return values | self._lag.named(_LAG, {})


@dataclass(slots=True)
class _Sum:
    """Sum and count of a histogram, which are of use without its buckets."""

    sum: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one more value into account."""
        self.sum += value
        self.count += 1

    def named(self, name: str, labels: Mapping[str, str]) -> dict[str, float]:
        """Both, by their names."""
        written = _labels(labels)
        return {f"{name}_sum{written}": self.sum, f"{name}_count{written}": self.count}


class _Together(Collector):
    """The registry and the readings as one."""

    def __init__(self, registry: CollectorRegistry, readings: Readings) -> None:
        self._registry = registry
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield from self._readings.families()


class _Recent:
    """Names that peers chose, the latest that were used: so that label values are bounded whatever comes.

    Args:
        limit: how many are kept.
        forget: called with each that is kept no longer.
    """

    def __init__(self, limit: int, forget: Callable[[str], None]) -> None:
        self._limit = limit
        self._forget = forget
        self._names: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def use(self, name: str) -> None:
        """Keep a name, as the one used last."""
        self._names.pop(name, None)
        self._names[name] = None
        if len(self._names) > self._limit:
            self._drop(next(iter(self._names)))

    def keep(self, names: Collection[str]) -> None:
        """Drop all others."""
        for name in [name for name in self._names if name not in names]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        del self._names[name]
        self._forget(name)


def _labels(labels: Mapping[str, str]) -> str:
    """Write labels as Prometheus does."""
    written = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{written}}}" if written else ""

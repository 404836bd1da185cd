"""The daemon's metrics, in base units, all named ``cpe_*``, in a registry of their own.

A version is a gauge's value, never a label: labels are kept to what there is a handful of on a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cpe_daemon import __version__
from cpe_daemon.core.lifecycle import EngineState

_UPDATE_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds: from a resume of some milliseconds to the receiving of a large model over a slow network."""

_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Metrics:
    """Every instrument of one daemon. The attributes are prometheus_client's; any thread may use them.

    Attributes:
        protocol_errors: messages refused, by ``socket``.
        versions: versions that came to an end of receiving or pushing, by ``model`` and ``outcome``.
        received_bytes: bytes of weights taken from trainers, by ``transport``.
        update_duration: seconds of each ``phase``, by ``model`` and ``engine`` ("" for phases of the node).
        failures: versions that failed, by the ``code`` of their error.
        engine_failures: engines that a round dropped, by the ``code`` of their error.
        rounds: push rounds by ``outcome``.
        engines: engines by ``state``; see `set_engines`.
        live_version: number of the version that is live, by ``model``.
        trainers: trainer ranks connected.
        arena_size: bytes of the arena.
        arena_free: bytes of it that are free.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cpe_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"cpe_{name}", text, labels, registry=self.registry)

        self.protocol_errors = counter("protocol_errors_total", "Messages refused.", "socket")
        self.versions = counter("versions_total", "Versions by how they ended.", "model", "outcome")
        self.received_bytes = counter("received_bytes_total", "Weights received from trainers.", "transport")
        self.failures = counter("failures_total", "Versions that failed, by error code.", "code")
        self.engine_failures = counter("engine_failures_total", "Engines dropped from a round, by error code.", "code")
        self.rounds = counter("rounds_total", "Push rounds by how they ended.", "outcome")
        self.update_duration = Histogram(
            "cpe_update_duration_seconds",
            "How long each phase of an update took.",
            ("phase", "model", "engine"),
            buckets=_UPDATE_BUCKETS,
            registry=self.registry,
        )
        self.engines = gauge("engines", "Engines by what is known of their weights.", "state")
        self.live_version = gauge("live_version", "Number of the live version.", "model")
        self.trainers = gauge("trainers", "Trainer ranks connected.")
        self.arena_size = gauge("arena_size_bytes", "Size of the arena.")
        self.arena_free = gauge("arena_free_bytes", "Bytes of the arena that are free.")
        gauge("build_info", "1, labelled with the version of cpe-daemon.", "version").labels(__version__).set(1)
        self.set_engines({})

    def count_protocol_error(self, socket: str) -> None:
        """Count a refused message; fits the ``on_protocol_error`` of `cpe_daemon.links`."""
        self.protocol_errors.labels(socket=socket).inc()

    def set_engines(self, counts: Mapping[str, int]) -> None:
        """Set how many engines are in each state; a state that ``counts`` leaves out has none."""
        for state in EngineState:
            self.engines.labels(state=state.value).set(counts.get(state, 0))

    def observe_phases(self, model: str, engine: str, phases: Mapping[str, float]) -> None:
        """Record seconds by phase of one engine's part in an update."""
        for phase, seconds in phases.items():
            self.update_duration.labels(phase=phase, model=model, engine=engine).observe(seconds)

    def snapshot(self) -> dict[str, float]:
        """Return every value by name and labels, as ``cpe_rounds_total{outcome="done"}``.

        Of histograms, sum and count.
        """
        values: dict[str, float] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_created", "_bucket")):
                    values[sample.name + _labels(sample.labels)] = sample.value
        return values


def _labels(labels: Mapping[str, str]) -> str:
    """Write labels as Prometheus does."""
    written = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{written}}}" if written else ""

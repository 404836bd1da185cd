"""Every metric that a daemon shows: name, kind, labels, meaning, and what an operator uses it for.

The one list: `metrics` makes its instruments of it, and ``docs/METRICS.md`` is written out of it. A version is a value
and never a label; labels are kept to what there is a bounded number of on a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric.

    Attributes:
        name: as Prometheus knows it; a counter's ends in ``_total``.
        kind: what its values mean.
        text: what is measured, in a sentence.
        use: the panel or the alert that it is for.
        labels: names of its labels.
    """

    name: str
    kind: Kind
    text: str
    use: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The unit of its values, by its name; "" if it counts things."""
        base = self.name.removesuffix("_total")
        return next((unit for unit in ("bytes", "seconds") if base.endswith(f"_{unit}")), "")


PHASES: Final[Mapping[str, str]] = {
    "publish": "first message of a version to staged, as the trainer sees it; of the node, so `engine` is empty",
    "stage": "the end of that: from the last rank's seal until its tensors are known to be whole; of the node",
    "prefetch": "slots fill while the engine serves",
    "pause": "the engine comes to a stop between two forward passes",
    "begin": "its workers make ready",
    "push": "buckets are loaded",
    "finish": "its workers post-process, and check that every tensor came",
    "resume": "it is told to serve again",
    "stopped": "from the pause's beginning until it serves again: what users of an engine notice",
    "total": "the whole round, from the first fetch",
}
"""Phases of an update, the values of the label ``phase``."""

STAGES: Final[Mapping[str, str]] = {
    "receive": "chunks from trainers into the arena, with their digests",
    "fetch": "from the arena into slots",
    "exchange": "between the slots of several GPUs",
    "load": "out of slots into the engines' weights; each engine's bytes count",
}
"""Stages that weights go through, the values of the label ``stage``."""

SOCKETS: Final = ("front", "engines", "handoff", "http")
"""The daemon's listeners, the values of the label ``socket``."""

THEMES: Final[Mapping[str, tuple[Instrument, ...]]] = {
    "Updates": (
        Instrument(
            "cpe_update_duration_seconds",
            "histogram",
            "How long each phase of an update took.",
            "Panels: phases of an update, and how long engines stood still (phase stopped). Alert: CpeSlowPause.",
            ("phase", "model", "engine"),
        ),
        Instrument(
            "cpe_versions_total",
            "counter",
            "Versions by how they ended: live or failed.",
            "Panel: versions. A trainer that publishes and never gets live shows here.",
            ("model", "outcome"),
        ),
        Instrument(
            "cpe_failures_total",
            "counter",
            "Versions that failed on this node, by error code.",
            "Panel: failures. Alert: CpeVersionsFail.",
            ("code",),
        ),
        Instrument(
            "cpe_engine_failures_total",
            "counter",
            "Engines that a round dropped, by error code.",
            "Panel: failures. Alert: CpeEngineDropped.",
            ("code",),
        ),
        Instrument(
            "cpe_rounds_total",
            "counter",
            "Parts of engines in push rounds, by how they ended: updated or failed.",
            "Panel: versions; the share of failed ones.",
            ("outcome",),
        ),
        Instrument("cpe_push_in_progress", "gauge", "1 while a round is in flight.", "Panel: slots and credits."),
        Instrument(
            "cpe_stage_bytes_total",
            "counter",
            "Bytes of weights by the stage that they went through.",
            "Panel: GB/s by stage, divided by cpe_stage_seconds_total.",
            ("stage",),
        ),
        Instrument(
            "cpe_stage_seconds_total",
            "counter",
            "Time during which a stage had anything to move; what overlaps counts once.",
            "Panel: GB/s by stage.",
            ("stage",),
        ),
        Instrument(
            "cpe_received_bytes_total",
            "counter",
            "Bytes of weights from trainers, by the way they came: landing (shared memory) or inline.",
            "Panel: received. A trainer of this host that comes inline is slower than it need be.",
            ("transport",),
        ),
    ),
    "Versions": (
        Instrument(
            "cpe_live_version",
            "gauge",
            "Number of the version that is live.",
            "Panel: versions by node; nodes of a fleet that differ for long.",
            ("model",),
        ),
        Instrument(
            "cpe_live_version_timestamp_seconds",
            "gauge",
            "When a version of the model last went live, in Unix time.",
            "Panel: age of the live version. Alert: CpeNoNewVersion, as an example: only you know the trainer's pace.",
            ("model",),
        ),
        Instrument(
            "cpe_staged_version",
            "gauge",
            "Number of the version that was staged last.",
            "Panel: versions by node; what is above the live one waits, or failed to be pushed.",
            ("model",),
        ),
        Instrument(
            "cpe_received_version",
            "gauge",
            "Number of the version whose first message came last.",
            "Panel: versions by node; what is above the staged one is being received, or failed.",
            ("model",),
        ),
        Instrument(
            "cpe_retained_versions",
            "gauge",
            "Previous versions that are kept for rollback.",
            "Table: memory. 0 means that a rollback needs the trainer.",
            ("model",),
        ),
    ),
    "Engines": (
        Instrument(
            "cpe_engines",
            "gauge",
            "Engines by what is known of their weights; one that is expected and absent is unknown.",
            "Panel: engines by state.",
            ("state",),
        ),
        Instrument(
            "cpe_engine_state",
            "gauge",
            "1 for the state that the engine is in, 0 for the others.",
            "Alerts: CpeEngineQuarantined, CpeEngineUnknown.",
            ("engine", "state"),
        ),
        Instrument(
            "cpe_engine_version",
            "gauge",
            "Number of the version that the engine holds whole; no sample while it holds none for certain.",
            "Panel: versions by engine.",
            ("engine", "model"),
        ),
        Instrument(
            "cpe_engine_lag_versions",
            "gauge",
            "Number of the version staged last, less that of the one which the engine holds; at least 1 if it holds "
            "none, or one of another run.",
            "Panel: lag. Alert: CpeEngineLags.",
            ("engine", "model"),
        ),
        Instrument(
            "cpe_engine_missing_workers",
            "gauge",
            "Ranks of the engine that are not attached, of an expected engine that is absent too.",
            "Alert: CpeEngineIncomplete.",
            ("engine",),
        ),
        Instrument("cpe_workers", "gauge", "Engine workers that are attached.", "Panel: engines by state."),
    ),
    "Trainers": (
        Instrument("cpe_trainers", "gauge", "Trainer ranks that are connected.", "Panel: slots and credits."),
        Instrument(
            "cpe_credits_granted",
            "gauge",
            "Chunks that trainer ranks may have unacknowledged, all together.",
            "Panel: slots and credits.",
        ),
        Instrument(
            "cpe_credits_in_use",
            "gauge",
            "Chunks that are on their way into the arena.",
            "Panel: slots and credits. As many as granted for long: copying is slower than what comes.",
        ),
    ),
    "Memory": (
        Instrument("cpe_arena_size_bytes", "gauge", "Size of the arena.", "Panel: arena."),
        Instrument(
            "cpe_arena_prefaulted_bytes",
            "gauge",
            "Bytes of the arena that the host has provided.",
            "Panel: arena. It grows during the start and equals the size after it.",
        ),
        Instrument("cpe_arena_free_bytes", "gauge", "Bytes of the arena that are in no extent.", "Panel: arena."),
        Instrument(
            "cpe_arena_largest_free_bytes",
            "gauge",
            "Bytes of the largest free run; a rank's contribution has to fit into one.",
            "Panel: arena. Alert: CpeArenaFull.",
        ),
        Instrument(
            "cpe_arena_leased_bytes",
            "gauge",
            "Bytes that are being read or written, and cannot be evicted.",
            "Panel: arena. Bytes that stay leased without a push or a publish are stuck.",
        ),
        Instrument("cpe_slots", "gauge", "Slots of a GPU.", "Panel: slots and credits.", ("gpu", "uuid")),
        Instrument(
            "cpe_slots_in_use",
            "gauge",
            "Slots of a GPU that hold a bucket.",
            "Panel: slots and credits.",
            ("gpu", "uuid"),
        ),
        Instrument("cpe_slot_size_bytes", "gauge", "Size of a slot.", "Table: memory."),
    ),
    "The daemon itself": (
        Instrument(
            "cpe_build_info",
            "gauge",
            "1, labelled with versions: of cpe-daemon, Python, torch if it is installed here, and the protocol spoken.",
            "Panel: releases by node, during an upgrade. Alert: CpeDaemonDown, where it goes missing.",
            ("version", "python", "torch", "protocol"),
        ),
        Instrument("cpe_ready", "gauge", "1 if /readyz says that the node is ready.", "Alert: CpeNotReady."),
        Instrument(
            "cpe_loop_lag_seconds",
            "histogram",
            "By how much the event loop was late, measured twice a second.",
            "Panel: loop lag. Alert: CpeLoopLags.",
        ),
        Instrument(
            "cpe_device_stuck_seconds",
            "gauge",
            "Age of the oldest copy to or between slots that is in flight.",
            "Alert: CpeDeviceStuck.",
        ),
        Instrument(
            "cpe_protocol_errors_total",
            "counter",
            "Messages and requests that were refused because they could not be understood or were not allowed then.",
            "Panel: refused messages. Alert: CpeProtocolErrors.",
            ("socket",),
        ),
        Instrument(
            "cpe_unknown_fields_total",
            "counter",
            "Fields of messages that this release does not know, and ignored.",
            "Panel: refused messages. It rises while a peer is newer than the daemon.",
            ("socket",),
        ),
        Instrument(
            "cpe_handoff_claims_total",
            "counter",
            "Descriptors of shared memory that were handed over to trainers and workers.",
            "Panel: refused messages, beside them. It should stand still between restarts of trainers and engines.",
        ),
    ),
}
"""All of them by theme, in the order of the document."""

INSTRUMENTS: Final[Mapping[str, Instrument]] = {
    instrument.name: instrument for theme in THEMES.values() for instrument in theme
}
"""All of them by name."""

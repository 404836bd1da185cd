"""Every metric that a daemon shows: name, kind, labels, meaning, and what an operator uses it for.

The one list: `metrics` makes its instruments of it, and ``docs/METRICS.md`` is written out of it. A version is a value
and never a label; labels are kept to what there is a bounded number of on a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cpe_daemon.observe.instrument import Instrument

THEMES: Final[Mapping[str, tuple[Instrument, ...]]] = {
    "Updates": (
        Instrument(
            "cpe_update_duration_seconds",
            "histogram",
            "How long each phase of an update took.",
            labels=("phase", "model", "engine"),
            panel="Phases of an update, median",
            alerts=("CpeSlowPause",),
            hint="Phase `stopped` is what users of an engine notice, and has a panel of its own.",
        ),
        Instrument(
            "cpe_versions_total",
            "counter",
            "Versions by how they ended: live or failed.",
            labels=("model", "outcome"),
            panel="Versions and engines' parts in pushes, by how they ended",
            hint="A trainer that publishes and never gets live shows here.",
        ),
        Instrument(
            "cpe_rollbacks_total",
            "counter",
            "Versions that were taken out of engines again, by who wanted it.",
            labels=("cause",),
            panel="Versions and engines' parts in pushes, by how they ended",
            hint="`operator` and `trainer` asked for the one before; `partial` is of versions that only some engines "
            "took, where push.partial is rollback.",
        ),
        Instrument(
            "cpe_failures_total",
            "counter",
            "Versions that failed on this node, by error code.",
            labels=("code",),
            panel="Failures by code",
            alerts=("CpeVersionsFail", "CpeArenaFull"),
        ),
        Instrument(
            "cpe_engine_failures_total",
            "counter",
            "Engines that a round dropped, by error code.",
            labels=("code",),
            panel="Failures by code",
            alerts=("CpeEngineDropped",),
        ),
        Instrument(
            "cpe_rounds_total",
            "counter",
            "Parts of engines in push rounds, by how they ended: updated or failed.",
            labels=("outcome",),
            panel="Versions and engines' parts in pushes, by how they ended",
        ),
        Instrument(
            "cpe_push_in_progress",
            "gauge",
            "1 while a round is in flight.",
            panel="Pushes in progress",
        ),
        Instrument(
            "cpe_stage_bytes_total",
            "counter",
            "Bytes of weights by the stage that they went through.",
            labels=("stage",),
            panel="Throughput by stage",
            hint="Divide by cpe_stage_seconds_total.",
        ),
        Instrument(
            "cpe_stage_seconds_total",
            "counter",
            "Time during which a stage had anything to move; what overlaps counts once.",
            labels=("stage",),
            panel="Throughput by stage",
        ),
        Instrument(
            "cpe_received_bytes_total",
            "counter",
            "Bytes of weights from trainers, by the way they came: landing (shared memory) or inline.",
            labels=("transport",),
            panel="Received from trainers",
            hint="A trainer of this host that comes inline is slower than it need be.",
        ),
    ),
    "Versions": (
        Instrument(
            "cpe_live_version",
            "gauge",
            "Number of the version that is live.",
            labels=("model",),
            panel="Live version",
            hint="Nodes of a fleet that differ for long.",
        ),
        Instrument(
            "cpe_live_version_timestamp_seconds",
            "gauge",
            "When a version of the model last went live, in Unix time.",
            labels=("model",),
            panel="Age of the live version",
            hint="An alert on it has to know your trainer's pace.",
        ),
        Instrument(
            "cpe_staged_version",
            "gauge",
            "Number of the version that was staged last.",
            labels=("model",),
            panel="Versions by node",
            hint="What is above the live one waits, or failed to be pushed.",
        ),
        Instrument(
            "cpe_received_version",
            "gauge",
            "Number of the version whose first message came last.",
            labels=("model",),
            panel="Versions by node",
            hint="What is above the staged one is being received, or failed.",
        ),
        Instrument(
            "cpe_retained_versions",
            "gauge",
            "Previous versions that are kept for rollback.",
            labels=("model",),
            panel="Memory by node and model",
            hint="0 means that a rollback needs the trainer.",
        ),
    ),
    "Engines": (
        Instrument(
            "cpe_engines",
            "gauge",
            "Engines by what is known of their weights; one that is expected and absent is unknown.",
            labels=("state",),
            panel="Engines by state",
        ),
        Instrument(
            "cpe_engine_state",
            "gauge",
            "1 for the state that the engine is in, 0 for the others.",
            labels=("engine", "state"),
            alerts=("CpeEngineQuarantined", "CpeEngineUnknown"),
        ),
        Instrument(
            "cpe_engine_version",
            "gauge",
            "Number of the version that the engine holds whole; no sample while it holds none for certain.",
            labels=("engine", "model"),
            panel="Versions by engine",
        ),
        Instrument(
            "cpe_engine_lag_versions",
            "gauge",
            "Number of the version staged last, less that of the one which the engine holds; at least 1 if it holds "
            "none, or one of another run. No sample while the engine is asleep.",
            labels=("engine", "model"),
            panel="Lag by engine",
            alerts=("CpeEngineLags",),
        ),
        Instrument(
            "cpe_engine_missing_workers",
            "gauge",
            "Ranks of the engine that are not attached, of an expected engine that is absent too.",
            labels=("engine",),
            panel="Workers",
            alerts=("CpeEngineIncomplete",),
        ),
        Instrument(
            "cpe_workers",
            "gauge",
            "Engine workers that are attached.",
            panel="Workers",
        ),
    ),
    "Trainers": (
        Instrument(
            "cpe_trainers",
            "gauge",
            "Trainer ranks that are connected.",
            panel="Slots and credits",
        ),
        Instrument(
            "cpe_credits_granted",
            "gauge",
            "Chunks that trainer ranks may have unacknowledged, all together.",
            panel="Slots and credits",
        ),
        Instrument(
            "cpe_credits_in_use",
            "gauge",
            "Chunks that are on their way into the arena.",
            panel="Slots and credits",
            hint="As many as granted for long: copying is slower than what comes.",
        ),
    ),
    "Memory": (
        Instrument(
            "cpe_arena_size_bytes",
            "gauge",
            "Size of the arena.",
            panel="Arena",
        ),
        Instrument(
            "cpe_arena_prefaulted_bytes",
            "gauge",
            "Bytes of the arena that the host has provided.",
            panel="Arena",
            hint="It grows during the start, and equals the size after it.",
        ),
        Instrument(
            "cpe_arena_free_bytes",
            "gauge",
            "Bytes of the arena that are in no extent.",
            panel="Arena",
            hint="Little is normal: a version that is retained goes when its room is needed.",
        ),
        Instrument(
            "cpe_arena_largest_free_bytes",
            "gauge",
            "Bytes of the largest free run.",
            panel="Arena",
            hint="A rank's contribution has to fit into one run.",
        ),
        Instrument(
            "cpe_arena_leased_bytes",
            "gauge",
            "Bytes that are being read or written, and cannot be evicted.",
            panel="Arena",
            hint="Bytes that stay leased without a push or a publish, and are not being digested, are stuck.",
        ),
        Instrument(
            "cpe_model_bytes",
            "gauge",
            "Bytes of the arena that all versions of a model take, as its quota counts them.",
            labels=("model",),
            panel="Arena by model",
        ),
        Instrument(
            "cpe_model_quota_bytes",
            "gauge",
            "Bytes of the arena that a model may take; 0: no bound.",
            labels=("model",),
            panel="Arena by model",
            hint="Where the model takes nearly as much, its next version is refused.",
        ),
        Instrument(
            "cpe_slots",
            "gauge",
            "Slots of a GPU.",
            labels=("gpu", "uuid"),
            panel="Memory by node and model",
        ),
        Instrument(
            "cpe_slots_in_use",
            "gauge",
            "Slots of a GPU that hold a bucket.",
            labels=("gpu", "uuid"),
            panel="Slots and credits",
        ),
        Instrument(
            "cpe_slot_size_bytes",
            "gauge",
            "Size of a slot.",
            panel="Memory by node and model",
        ),
    ),
    "The daemon itself": (
        Instrument(
            "cpe_build_info",
            "gauge",
            "1, labelled with versions: of cpe-daemon, Python, torch if it is installed here, and the protocol spoken.",
            labels=("version", "python", "torch", "protocol"),
            panel="Releases",
            hint="Which nodes have been upgraded.",
        ),
        Instrument(
            "cpe_ready",
            "gauge",
            "1 if /readyz says that the node is ready.",
            panel="Nodes ready",
            alerts=("CpeNotReady",),
        ),
        Instrument(
            "cpe_journal_failing",
            "gauge",
            "1 while the journal in state_dir cannot be written.",
            alerts=("CpeJournalFails",),
            hint="Updates go on; after a crash the node would know less.",
        ),
        Instrument(
            "cpe_loop_lag_seconds",
            "histogram",
            "By how much the event loop was late, measured twice a second.",
            panel="Loop lag, 99th percentile",
            alerts=("CpeLoopLags",),
        ),
        Instrument(
            "cpe_copy_stuck_seconds",
            "gauge",
            "Age of the oldest copy that is in flight; 0 if none is.",
            labels=("copies",),
            panel="Loop lag, 99th percentile",
            alerts=("CpeCopyStuck",),
            hint="Copies take milliseconds.",
        ),
        Instrument(
            "cpe_protocol_errors_total",
            "counter",
            "Messages and requests that were refused because they could not be understood or were not allowed then.",
            labels=("socket",),
            panel="Refused messages",
            alerts=("CpeProtocolErrors",),
        ),
        Instrument(
            "cpe_unknown_fields_total",
            "counter",
            "Fields of messages that this release does not know, and ignored.",
            labels=("socket",),
            panel="Refused messages",
            hint="It rises while a peer is newer than the daemon.",
        ),
        Instrument(
            "cpe_handoff_claims_total",
            "counter",
            "Descriptors of shared memory that were handed over to trainers and workers.",
            panel="Refused messages",
            hint="It stands still between restarts of trainers and engines.",
        ),
    ),
}
"""All of them by theme, in the order of the document."""

INSTRUMENTS: Final[Mapping[str, Instrument]] = {
    instrument.name: instrument for theme in THEMES.values() for instrument in theme
}
"""All of them by name."""

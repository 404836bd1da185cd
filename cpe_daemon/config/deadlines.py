"""How long each phase may take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from cpe_daemon.config.section import Seconds, Section
from cpe_daemon.config.units import format_seconds

Deadline = Annotated[Seconds, Field(ge=0.001, le=86_400.0)]
"""How long something may take before it has failed."""


class DeadlinesConfig(Section):
    """How long each phase may take, 1ms to 24h. One that takes longer fails, naming whom it waited for."""

    hello_seconds: Deadline = Field(
        default=10.0,
        description="A client that has connected introduces itself; an engine gets all its workers.",
    )
    heartbeat_interval_seconds: Deadline = Field(default=1.0, description="Clients say that they are alive this often.")
    heartbeat_lost_seconds: Deadline = Field(
        default=10.0, description="A client that is silent for so long is gone. At least twice the interval."
    )
    receive_idle_seconds: Deadline = Field(
        default=30.0, description="The next byte of a version that is being received comes."
    )
    receive_total_seconds: Deadline = Field(
        default=1800.0,
        description="A version is received whole, from the first rank's manifest to the last seal.",
    )
    reserve_seconds: Deadline = Field(default=60.0, description="The arena makes room for a rank's contribution.")
    check_seconds: Deadline = Field(
        default=30.0, description="An engine that serves says whether it could load a version."
    )
    arrive_seconds: Deadline = Field(
        default=300.0,
        description="A server whose workers are there takes calls, where a version waits for it: no other engine takes"
        " it.",
    )
    journal_seconds: Deadline = Field(
        default=2.0,
        description="What is about to be done is on the disk of state_dir, before engines pause. Then it is done all "
        "the same, and told.",
    )
    wake_seconds: Deadline = Field(
        default=60.0, description="An engine that is asleep wakes up for a version (push.asleep: wake)."
    )
    pause_seconds: Deadline = Field(default=60.0, description="An engine stops serving.")
    begin_seconds: Deadline = Field(default=30.0, description="An engine's workers are ready for the first bucket.")
    bucket_seconds: Deadline = Field(default=60.0, description="Every worker loads one bucket.")
    finish_seconds: Deadline = Field(default=120.0, description="An engine post-processes and verifies its weights.")
    resume_seconds: Deadline = Field(default=30.0, description="An engine serves again.")
    abort_seconds: Deadline = Field(default=10.0, description="Workers let go of a round that has failed.")
    restore_attempts: int = Field(
        default=1,
        ge=1,
        le=10,
        description="Tries to give an engine the last good version after a fault. Then it stays paused.",
    )
    drain_seconds: Deadline = Field(default=20.0, description="A push in flight ends by itself when the daemon stops.")
    undo_seconds: Deadline = Field(
        default=30.0, description="A push that did not is undone: engines get what they held, and serve it again."
    )
    stuck_seconds: Deadline = Field(
        default=30.0,
        description="One copy in host memory or to a GPU. One that takes longer is stuck: the daemon says that it is"
        " not healthy, and leaves its watchdog unfed.",
    )

    @field_validator("heartbeat_lost_seconds")
    @classmethod
    def _two_heartbeats(cls, value: float, info: ValidationInfo) -> float:
        interval = info.data.get("heartbeat_interval_seconds", 0.0)
        if value < 2 * interval:
            raise ValueError(
                f"{format_seconds(value)} is less than two heartbeats of {format_seconds(interval)}; write at"
                f" least {format_seconds(2 * interval)}, or lower deadlines.heartbeat_interval_seconds"
            )
        return value

    @field_validator("receive_total_seconds")
    @classmethod
    def _idle_within_total(cls, value: float, info: ValidationInfo) -> float:
        idle = info.data.get("receive_idle_seconds", 0.0)
        if value < idle:
            raise ValueError(
                f"{format_seconds(value)} is shorter than deadlines.receive_idle_seconds"
                f" ({format_seconds(idle)}), which could never pass; raise this one or lower that one"
            )
        return value

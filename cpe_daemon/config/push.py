"""When versions go into engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cpe_daemon.config.section import Section


class PushConfig(Section):
    """When a version goes from this node's memory into its engines."""

    automatic: bool = Field(
        default=True,
        description="Push a version as soon as it is whole and verified. false: it waits for `cpe push`, until a newer "
        "one takes its place; the arena then needs room for three: one served, one that waits, one that comes.",
    )
    newer: Literal["queue", "supersede"] = Field(
        default="queue",
        description="What a version that is staged does to older ones of its model that still wait to be pushed by "
        "themselves. queue: each has its turn. supersede: they are given up, and their trainers told.",
    )
    partial: Literal["keep", "rollback"] = Field(
        default="keep",
        description="What becomes of a version that some engines took and others failed to take. keep: it is live, and "
        "the others get what they held. rollback: it is taken back from those that took it, and has failed.",
    )
    asleep: Literal["defer", "refuse", "wake"] = Field(
        default="defer",
        description="What a push does about an engine that is asleep, its GPU's memory lent to others. defer: it is "
        "passed over, and gets the live version when it wakes up, before it serves. refuse: it counts as failed. wake: "
        "it is told to wake up first.",
    )

"""The values of labels that are known beforehand, each with its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PHASES: Final[Mapping[str, str]] = {
    "publish": "first message of a version to staged, as the trainer sees it; of the node, so `engine` is empty",
    "stage": "the end of that: from the last rank's seal until its tensors are known to be whole; of the node",
    "prefetch": "slots fill while the engine serves",
    "check": "an engine says whether the version fits it, while it serves; not if it took one of such tensors before",
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
    "receive": "chunks from trainers into the arena, with their digests unless those are made later",
    "fetch": "from the arena into slots",
    "exchange": "between the slots of several GPUs",
    "load": "out of slots into the engines' weights; each engine's bytes count",
}
"""Stages that weights go through, the values of the label ``stage``."""

SOCKETS: Final[Mapping[str, str]] = {
    "front": "trainers and operators of this host, and those over tcp where ingest.insecure allows that",
    "remote": "trainers and operators over tcp, with keys",
    "handshake": "clients over tcp whose keys were refused",
    "engines": "engine workers",
    "handoff": "processes of this host that fetch shared memory",
    "http": "probes and scrapers",
}
"""Who is listened to where, the values of the label ``socket``."""

ROLLBACKS: Final[Mapping[str, str]] = {
    "operator": "by `cpe rollback`",
    "trainer": "by `Publisher.rollback`",
    "partial": "by push.partial: rollback, for some engines had not taken the version",
}
"""Why versions are taken back, the values of the label ``cause``."""

COPIES: Final[Mapping[str, str]] = {"in": "into the arena", "out": "out of the arena"}
"""What copies are for, the values of the label ``copies``."""

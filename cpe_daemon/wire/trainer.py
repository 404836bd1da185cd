"""The conversation of a trainer rank with the daemon. Bulk bytes travel beside a message as frames of their own."""

from __future__ import annotations

from typing import Final

from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.wire.message import Message
from cpe_daemon.wire.reports import ErrorInfo, VersionReport

MOST_CHUNK_FRAMES: Final = 32
"""Frames that a chunk may come in: the parts of several tensors, as they lie at the trainer."""

# --- trainer rank -> daemon -------------------------------------------------------------------------------------------


class TrainerHello(Message, frozen=True, tag="trainer_hello"):
    """A trainer rank introduces itself. ``boot_id`` equal to the daemon's means the same host."""

    protocol: int
    model: str
    run: str
    rank: int
    world_size: int
    boot_id: str = ""
    pid: int = 0


class OpenVersion(Message, frozen=True, tag="open_version"):
    """A rank begins to contribute to a version over ``stream``, a number that it chose and never reuses on this link.

    The manifest follows in `ManifestPart`s; the daemon answers `VersionOpened` when it has all of it and the room.
    ``folded``: the `Seal` will bring the fold, as far as it is the rank's own to make. ``undigested``: and no digests,
    if the daemon can do without.
    """

    stream: int
    version: VersionId
    tensors: int
    nbytes: int
    force: bool = False
    folded: bool = False
    undigested: bool = False


class ManifestPart(Message, frozen=True, tag="manifest_part"):
    """Shards ``first`` onwards of a rank's contribution."""

    stream: int
    first: int
    shards: list[Shard]


class Chunk(Message, frozen=True, tag="chunk"):
    """Bytes ``offset`` to ``offset + nbytes`` of a rank's extent.

    They lie at ``ring_offset`` of the landing ring, or, if that is -1, in the frames beside this message, one after
    another: one, or as many as `TrainerWelcome` allows, none of them empty. Takes one credit until `ChunkDone`.
    """

    stream: int
    offset: int
    nbytes: int
    ring_offset: int = -1


class Seal(Message, frozen=True, tag="seal"):
    """A rank has sent every byte; ``digests`` holds xxh3_128 of each shard, 16 bytes each, in order.

    ``fold``: of the bytes that are rows of their tensors (`cpe_daemon.core.fold.own_bytes`), if that was announced. If
    these are all bytes, ``digests`` may be empty: engines are held to the fold, and the daemon digests when it can.
    """

    stream: int
    digests: bytes
    fold: int | None = None


class Abandon(Message, frozen=True, tag="abandon"):
    """A rank gives its contribution up; the version fails on this node."""

    stream: int
    reason: str


class Watch(Message, frozen=True, tag="watch"):
    """Ask for a `VersionStatus` now and at every later change of a version that another link opened."""

    version: VersionId


class TrainerRollback(Message, frozen=True, tag="trainer_rollback"):
    """Roll the trainer's model back on this node; answered by a `PushReply` or an `ErrorReply` of this ``stream``.

    ``stream`` is a number below 0 that the trainer chose for the question: no contribution has one. Without ``number``
    (-1): the retained version that was live last. ``run`` "": of any run.
    """

    stream: int
    number: int = -1
    run: str = ""


class TrainerWait(Message, frozen=True, tag="trainer_wait"):
    """Tell when version ``number`` of a run of the trainer's model, or a later one, is live on this node.

    Answered by a `WaitReply` or an `ErrorReply` of this ``stream``, which is as in `TrainerRollback`: an error at once
    if the version has failed, a deadline after ``seconds``. ``run`` "": the trainer's own.
    """

    stream: int
    number: int
    seconds: float
    run: str = ""


class TrainerBye(Message, frozen=True, tag="trainer_bye"):
    """A rank parts: what it has not sealed is given up, and its link is over. Answered by a `Pong`."""


# --- daemon -> trainer rank -------------------------------------------------------------------------------------------


class TrainerWelcome(Message, frozen=True, tag="trainer_welcome"):
    """The terms of a trainer's link.

    ``credits`` chunks of at most ``chunk_bytes`` may be unacknowledged. If ``landing_token`` is given, it can be
    exchanged at ``handoff`` (a unix socket) for the landing ring: ``credits`` places of ``chunk_bytes`` each. A chunk
    beside its message may come in ``chunk_frames`` frames at most. ``folds``: versions are folded here, unless the rank
    does it.
    """

    protocol: int
    generation: str
    heartbeat_seconds: float
    credits: int
    chunk_bytes: int
    handoff: str = ""
    landing_token: bytes = b""
    chunk_frames: int = 1
    folds: bool = False


class VersionOpened(Message, frozen=True, tag="version_opened"):
    """The daemon holds the whole manifest and has the room: bytes may come.

    ``held``: it holds the version already, of these very shards. No bytes are wanted, only the `Seal`; that is answered
    by a `VersionStatus` of this stream if the digests are equal, by an `ErrorReply` otherwise.
    """

    stream: int
    held: bool = False


class ChunkDone(Message, frozen=True, tag="chunk_done"):
    """A chunk is in the arena: its credit, and its place in the landing ring, are free again."""

    stream: int
    ring_offset: int = -1


class VersionStatus(Message, frozen=True, tag="version_status"):
    """A version changed its state on this node.

    ``stream`` is that of a contribution to a version that was held, whose digests are equal: this answers its `Seal`.
    """

    version: VersionId
    state: str
    error: ErrorInfo | None = None
    report: VersionReport | None = None
    stream: int = 0

"""Every message that crosses a socket, by conversation. Bulk bytes travel beside a message as frames of their own.

Compatibility: a daemon speaks `PROTOCOL` and the one before it. A field added later has a default; a field that a peer
does not know is ignored and counted; a message type that it does not know gets an `ErrorReply`. A field is never
renamed, retyped or reused.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cpe_daemon.core.types import Shard, TensorSpec, VersionId
from cpe_daemon.wire.reports import ErrorInfo, VersionReport

PROTOCOL: Final = 1
OLDEST_PROTOCOL: Final = max(1, PROTOCOL - 1)
"""The protocols that this release speaks: its own and the one before."""


class Message(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Base of all messages. On the wire each carries its tag in the field ``type``."""


class ErrorReply(Message, frozen=True, tag="error"):
    """The peer's last message was refused. ``stream`` names the stream that it belonged to (0: none)."""

    error: ErrorInfo
    stream: int = 0


class Ping(Message, frozen=True, tag="ping"):
    """A client is alive; sent at the interval that the daemon's welcome gave."""


class Pong(Message, frozen=True, tag="pong"):
    """The daemon is alive. Another ``generation`` than before: it was restarted, and knows nothing of this client."""

    generation: str


# --- trainer rank -> daemon ------------------------------------------------------------------------------------------


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
    """

    stream: int
    version: VersionId
    tensors: int
    nbytes: int
    force: bool = False


class ManifestPart(Message, frozen=True, tag="manifest_part"):
    """Shards ``first`` onwards of a rank's contribution."""

    stream: int
    first: int
    shards: list[Shard]


class Chunk(Message, frozen=True, tag="chunk"):
    """Bytes ``offset`` to ``offset + nbytes`` of a rank's extent.

    They lie at ``ring_offset`` of the landing ring, or, if that is -1, in the one frame beside this message. Takes one
    credit until `ChunkDone`.
    """

    stream: int
    offset: int
    nbytes: int
    ring_offset: int = -1


class Seal(Message, frozen=True, tag="seal"):
    """A rank has sent every byte; ``digests`` holds xxh3_128 of each shard, 16 bytes each, in order."""

    stream: int
    digests: bytes


class Abandon(Message, frozen=True, tag="abandon"):
    """A rank gives its contribution up; the version fails on this node."""

    stream: int
    reason: str


class Watch(Message, frozen=True, tag="watch"):
    """Ask for a `VersionStatus` now and at every later change of a version that another link opened."""

    version: VersionId


# --- daemon -> trainer rank ------------------------------------------------------------------------------------------


class TrainerWelcome(Message, frozen=True, tag="trainer_welcome"):
    """The terms of a trainer's link.

    ``credits`` chunks of at most ``chunk_bytes`` may be unacknowledged. If ``landing_token`` is given, it can be
    exchanged at ``handoff`` (a unix socket) for the landing ring: ``credits`` places of ``chunk_bytes`` each.
    """

    protocol: int
    generation: str
    heartbeat_seconds: float
    credits: int
    chunk_bytes: int
    handoff: str = ""
    landing_token: bytes = b""


class VersionOpened(Message, frozen=True, tag="version_opened"):
    """The daemon holds the whole manifest and has the room: bytes may come."""

    stream: int


class ChunkDone(Message, frozen=True, tag="chunk_done"):
    """A chunk is in the arena: its credit, and its place in the landing ring, are free again."""

    stream: int
    ring_offset: int = -1


class VersionStatus(Message, frozen=True, tag="version_status"):
    """A version changed its state on this node."""

    version: VersionId
    state: str
    error: ErrorInfo | None = None
    report: VersionReport | None = None


# --- operator <-> daemon ---------------------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True, tag="status_request"):
    """Ask for the whole state of the daemon."""

    protocol: int = PROTOCOL


class StatusReply(Message, frozen=True, tag="status_reply"):
    """The state of the daemon, as plain JSON-able values; keys are documented in ``cpe status --help``."""

    status: dict[str, Any]


# --- engine worker -> daemon -----------------------------------------------------------------------------------------


class WorkerHello(Message, frozen=True, tag="worker_hello"):
    """An engine worker introduces itself.

    ``incarnation`` is new with every start of its process. ``content`` is the version it holds whole, if any;
    ``touched`` says that it may hold a mixture. ``gpu`` is the UUID of its GPU ("" lets a CPU host's daemon choose).
    """

    protocol: int
    engine: str
    kind: str
    rank: int
    world_size: int
    incarnation: str
    model: str = ""
    node: str = ""
    gpu: str = ""
    leader: bool = True
    pid: int = 0
    content: VersionId | None = None
    touched: bool = False


class StepDone(Message, frozen=True, tag="step_done"):
    """A worker carried out one step (or one bucket, ``seq``) of a round. ``seconds`` is its own time for it.

    ``touched`` answers an `Abort`: the worker's weights may be others than before the round.
    """

    round: int
    step: str
    seq: int = 0
    seconds: float = 0.0
    touched: bool = False


class StepFailed(Message, frozen=True, tag="step_failed"):
    """A worker could not carry out a step."""

    round: int
    step: str
    error: ErrorInfo
    seq: int = 0


class WorkerBye(Message, frozen=True, tag="worker_bye"):
    """A worker detaches on purpose; its engine is forgotten with its last worker. Answered by a `Pong`."""


# --- daemon -> engine worker -----------------------------------------------------------------------------------------


class SlotSet(msgspec.Struct, frozen=True, omit_defaults=True):
    """The slots of one GPU as a worker opens them: ``count`` of ``slot_bytes`` each.

    ``kind`` is the device's name. ``handles`` are the device's: for shm one hand-off token, good once, for the memory
    of all slots, one after another.
    """

    kind: str
    gpu: str
    count: int
    slot_bytes: int
    handles: list[bytes]


class WorkerWelcome(Message, frozen=True, tag="worker_welcome"):
    """The terms of a worker's link. ``hold``: do not serve before `Resume`, the live version is about to come."""

    protocol: int
    generation: str
    heartbeat_seconds: float
    slots: SlotSet
    handoff: str
    hold: bool = False


class Pause(Message, frozen=True, tag="pause"):
    """Stop serving between two forward passes, within ``deadline_seconds``."""

    round: int
    deadline_seconds: float


class Expect(Message, frozen=True, tag="expect"):
    """What the round's version brings: tensors ``first`` onwards of ``total``. Sent before the pause, not answered.

    A worker compares it with what it holds while it still serves; `Begin` then fails if they differ, and no weight has
    been touched. Left out when the worker has loaded a version of these very tensors before.
    """

    round: int
    first: int
    total: int
    tensors: list[TensorSpec]


class Begin(Message, frozen=True, tag="begin"):
    """A version's buckets are about to come: ``tensors`` tensors of ``nbytes`` in all."""

    round: int
    version: VersionId
    tensors: int
    nbytes: int


class TensorPart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bytes ``tensor_offset`` onwards of a tensor, ``nbytes`` of them, at ``slot_offset`` of the bucket's slot."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor_offset: int
    nbytes: int
    slot_offset: int


class Load(Message, frozen=True, tag="load"):
    """Bucket ``seq`` lies in ``slot``: load its parts, and say `StepDone` when the slot may be overwritten."""

    round: int
    seq: int
    slot: int
    parts: list[TensorPart]


class Finish(Message, frozen=True, tag="finish"):
    """Every bucket is loaded: post-process, and check that all tensors were consumed."""

    round: int


class Abort(Message, frozen=True, tag="abort"):
    """Forget the round; stay paused."""

    round: int
    reason: str


class Resume(Message, frozen=True, tag="resume"):
    """Serve again. ``content`` is the version that the engine holds now (None: what it started with)."""

    round: int
    content: VersionId | None = None


FrontMessage = TrainerHello | OpenVersion | ManifestPart | Chunk | Seal | Abandon | Watch | Ping | StatusRequest
"""What the daemon's front door takes, from trainers and operators."""

FrontReply = TrainerWelcome | VersionOpened | ChunkDone | VersionStatus | StatusReply | Pong | ErrorReply
"""What a trainer or an operator gets."""

WorkerMessage = WorkerHello | StepDone | StepFailed | WorkerBye | Ping
"""What engine workers send."""

WorkerCommand = WorkerWelcome | Expect | Pause | Begin | Load | Finish | Abort | Resume | Pong | ErrorReply
"""What engine workers get."""

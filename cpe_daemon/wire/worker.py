"""The conversation of an engine worker with the daemon."""

from __future__ import annotations

import msgspec

from cpe_daemon.core.needs import Needs
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.wire.message import Message
from cpe_daemon.wire.reports import ErrorInfo, LoadingReport

# --- engine worker -> daemon ------------------------------------------------------------------------------------------


class WorkerHello(Message, frozen=True, tag="worker_hello"):
    """An engine worker introduces itself.

    ``incarnation`` is new with every start of its process. ``content`` is the version it holds whole, if any, and
    ``digest`` that version's as its `Begin` said; ``touched`` says that it may hold a mixture, ``asleep`` that its
    weights' memory is lent to others. ``gpu`` is the UUID of its GPU ("" lets a CPU host's daemon choose). ``url`` is
    where the engine's own API is, if it has one; what a ``leader`` says counts. ``starting`` says that it has not
    served yet: nothing has to be paused, and its API may not be there.
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
    asleep: bool = False
    digest: bytes = b""
    url: str = ""
    starting: bool = False


class WorkerState(Message, frozen=True, tag="worker_state"):
    """A worker goes to sleep, or has woken up, by itself or because of `Wake`. Not answered.

    While it is ``asleep`` the memory of its weights may belong to others: it has let its slots go, serves nobody, and
    refuses every step that would touch weights. Awake it says what its weights are by then, as in `WorkerHello`, and
    serves after the next `Resume`.
    """

    asleep: bool
    content: VersionId | None = None
    touched: bool = False
    digest: bytes = b""


class StepDone(Message, frozen=True, tag="step_done"):
    """A worker carried out one step (or one bucket, ``seq``) of a round. ``seconds`` is its own time for it.

    ``touched`` answers an `Abort`: the worker's weights may be others than before the round. ``passes`` answers a
    `Halt`. ``loading`` answers a `Finish`, of a worker that learns how its engine loads; ``needs`` as well, if it needs
    other bytes than `Begin` had. ``whole`` answers a `Begin`: it needs every byte, whatever it said before.
    """

    round: int
    step: str
    seq: int = 0
    seconds: float = 0.0
    touched: bool = False
    passes: int = 0
    loading: LoadingReport | None = None
    whole: bool = False
    needs: Needs | None = None


class StepFailed(Message, frozen=True, tag="step_failed"):
    """A worker could not carry out a step."""

    round: int
    step: str
    error: ErrorInfo
    seq: int = 0


class WorkerBye(Message, frozen=True, tag="worker_bye"):
    """A worker detaches on purpose; its engine is forgotten with its last worker. Answered by a `Pong`."""


# --- daemon -> engine worker ------------------------------------------------------------------------------------------


class SlotSet(msgspec.Struct, frozen=True, omit_defaults=True):
    """The slots of one GPU as a worker opens them: ``count`` of ``slot_bytes`` each, one after another.

    ``kind`` is the device's name. ``handles`` are the device's: for shm a hand-off token, good once; for cuda the 64
    bytes of a raw memory handle.
    """

    kind: str
    gpu: str
    count: int
    slot_bytes: int
    handles: list[bytes]


class WorkerWelcome(Message, frozen=True, tag="worker_welcome"):
    """The terms of a worker's link.

    ``tether`` is a hand-off token: what is claimed for it at ``handoff`` ties the two lives together. ``hold``: do not
    serve before `Resume`, the live version is about to come.
    """

    protocol: int
    generation: str
    heartbeat_seconds: float
    tether: bytes
    handoff: str
    hold: bool = False


class OpenSlots(Message, frozen=True, tag="open_slots"):
    """Open these slots, in place of those that are open. ``round`` counts openings and closings, and is no round's.

    ``folds``: updates will be verified, so what that takes may be made ready now.
    """

    round: int
    slots: SlotSet
    folds: bool = False


class CloseSlots(Message, frozen=True, tag="close_slots"):
    """Let the slots go: their memory is about to be freed. ``round`` as in `OpenSlots`."""

    round: int


class Halt(Message, frozen=True, tag="halt"):
    """Let no further forward pass begin until `Pause`, and say how many were begun since the last update.

    Sent to the workers of an engine that has several, whose forward passes wait for one another: each is told by
    `Pause` to end with the last one that any of them has begun.
    """

    round: int


class Pause(Message, frozen=True, tag="pause"):
    """Stop serving between two forward passes, within ``deadline_seconds``.

    ``passes``: when so many were begun, as `Halt` counts them, and no later. None: as soon as may be.
    """

    round: int
    deadline_seconds: float
    passes: int | None = None


class Expect(Message, frozen=True, tag="expect"):
    """What a version brings: tensors ``first`` onwards of ``total``. Sent before the pause, not answered.

    A worker compares it with what it holds while it still serves, and `Check` asks for the outcome. Left out when the
    worker has loaded a version of these very tensors before. A ``round`` below 0 is a question outside of any round.
    """

    round: int
    first: int
    total: int
    tensors: list[TensorSpec]


class Digested(Message, frozen=True, tag="digested"):
    """The digest of a version that a worker was given by a `Begin` without one. Not answered."""

    version: VersionId
    digest: bytes


class Check(Message, frozen=True, tag="check"):
    """Say whether a version of the tensors that `Expect` brought under this ``round`` can be loaded."""

    round: int


class Wake(Message, frozen=True, tag="wake"):
    """Wake up, within ``deadline_seconds``. ``round`` counts such requests to one engine, and is no round's."""

    round: int
    deadline_seconds: float


class Begin(Message, frozen=True, tag="begin"):
    """A version's buckets are about to come: ``tensors`` tensors of ``nbytes`` in all.

    ``fold`` is that of all their bytes (`cpe_daemon.core.fold`): `Finish` fails unless what came has it. None: nobody
    is to look. ``digest`` is the version's (`cpe_daemon.core.identity`): a worker keeps it beside the version's name.
    ``needs`` is the digest of what this worker said that it needs: it may be sent no more than that, unless it answers
    that it needs the ``whole``. "": everything is sent, and it may say what it needs. None: nobody wants to know.
    """

    round: int
    version: VersionId
    tensors: int
    nbytes: int
    fold: int | None = None
    digest: bytes = b""
    needs: str | None = None


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
    """Every bucket is loaded: check that all tensors came, as they were staged, and post-process."""

    round: int


class Abort(Message, frozen=True, tag="abort"):
    """Forget the round; stay paused."""

    round: int
    reason: str


class Resume(Message, frozen=True, tag="resume"):
    """Serve again. ``content`` is the version that the engine holds now (None: what it started with)."""

    round: int
    content: VersionId | None = None

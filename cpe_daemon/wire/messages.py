"""Every message that crosses a socket, and which of them each side takes."""

from __future__ import annotations

from cpe_daemon.wire.message import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    ErrorReply,
    Farewell,
    Message,
    Ping,
    Pong,
)
from cpe_daemon.wire.operator import (
    Done,
    EngineAdd,
    EngineRemove,
    EngineSpec,
    EvictRequest,
    PushReply,
    PushRequest,
    RollbackRequest,
    StatusReply,
    StatusRequest,
    WaitReply,
    WaitRequest,
)
from cpe_daemon.wire.trainer import (
    MOST_CHUNK_FRAMES,
    Abandon,
    Chunk,
    ChunkDone,
    ManifestPart,
    OpenVersion,
    Seal,
    TrainerBye,
    TrainerHello,
    TrainerRollback,
    TrainerWait,
    TrainerWelcome,
    VersionOpened,
    VersionStatus,
    Watch,
)
from cpe_daemon.wire.worker import (
    Abort,
    Begin,
    Check,
    CloseSlots,
    Digested,
    Expect,
    Finish,
    Halt,
    Load,
    OpenSlots,
    Pause,
    Resume,
    SlotSet,
    StepDone,
    StepFailed,
    TensorPart,
    Wake,
    WorkerBye,
    WorkerHello,
    WorkerState,
    WorkerWelcome,
)

__all__ = [
    "MOST_CHUNK_FRAMES",
    "OLDEST_PROTOCOL",
    "PROTOCOL",
    "Abandon",
    "Abort",
    "Begin",
    "Check",
    "Chunk",
    "ChunkDone",
    "CloseSlots",
    "Digested",
    "Done",
    "EngineAdd",
    "EngineRemove",
    "EngineSpec",
    "ErrorReply",
    "EvictRequest",
    "Expect",
    "Farewell",
    "Finish",
    "FrontMessage",
    "FrontReply",
    "Halt",
    "Load",
    "ManifestPart",
    "Message",
    "OpenSlots",
    "OpenVersion",
    "Pause",
    "Ping",
    "Pong",
    "PushReply",
    "PushRequest",
    "Resume",
    "RollbackRequest",
    "Seal",
    "SlotSet",
    "StatusReply",
    "StatusRequest",
    "StepDone",
    "StepFailed",
    "TensorPart",
    "TrainerBye",
    "TrainerHello",
    "TrainerRollback",
    "TrainerWait",
    "TrainerWelcome",
    "VersionOpened",
    "VersionStatus",
    "WaitReply",
    "WaitRequest",
    "Wake",
    "Watch",
    "WorkerBye",
    "WorkerCommand",
    "WorkerHello",
    "WorkerMessage",
    "WorkerState",
    "WorkerWelcome",
]

FrontMessage = (
    TrainerHello
    | OpenVersion
    | ManifestPart
    | Chunk
    | Seal
    | Abandon
    | Watch
    | TrainerRollback
    | TrainerWait
    | TrainerBye
    | Ping
    | StatusRequest
    | PushRequest
    | RollbackRequest
    | WaitRequest
    | EvictRequest
    | EngineAdd
    | EngineRemove
)
"""What the daemon's front door takes, from trainers and operators."""

FrontReply = (
    TrainerWelcome
    | VersionOpened
    | ChunkDone
    | VersionStatus
    | StatusReply
    | PushReply
    | WaitReply
    | Done
    | Farewell
    | Pong
    | ErrorReply
)
"""What a trainer or an operator gets."""

WorkerMessage = WorkerHello | WorkerState | StepDone | StepFailed | WorkerBye | Ping
"""What engine workers send."""

WorkerCommand = (
    WorkerWelcome
    | OpenSlots
    | CloseSlots
    | Expect
    | Digested
    | Check
    | Wake
    | Halt
    | Pause
    | Begin
    | Load
    | Finish
    | Abort
    | Resume
    | Farewell
    | Pong
    | ErrorReply
)
"""What engine workers get."""

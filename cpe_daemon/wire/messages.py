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
    PushReply,
    PushRequest,
    RollbackRequest,
    StatusReply,
    StatusRequest,
    WaitReply,
    WaitRequest,
)
from cpe_daemon.wire.trainer import (
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
    CloseSlots,
    Expect,
    Finish,
    Load,
    OpenSlots,
    Pause,
    Resume,
    SlotSet,
    StepDone,
    StepFailed,
    TensorPart,
    WorkerBye,
    WorkerHello,
    WorkerWelcome,
)

__all__ = [
    "OLDEST_PROTOCOL",
    "PROTOCOL",
    "Abandon",
    "Abort",
    "Begin",
    "Chunk",
    "ChunkDone",
    "CloseSlots",
    "Done",
    "EngineAdd",
    "EngineRemove",
    "EngineSpec",
    "ErrorReply",
    "Expect",
    "Farewell",
    "Finish",
    "FrontMessage",
    "FrontReply",
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
    "Seal",
    "SlotSet",
    "StatusReply",
    "StatusRequest",
    "StepDone",
    "StepFailed",
    "RollbackRequest",
    "TensorPart",
    "TrainerBye",
    "TrainerHello",
    "TrainerWelcome",
    "VersionOpened",
    "VersionStatus",
    "Watch",
    "WorkerBye",
    "WorkerCommand",
    "TrainerRollback",
    "TrainerWait",
    "WorkerHello",
    "WorkerMessage",
    "WorkerWelcome",
    "WaitReply",
    "WaitRequest",
    "Wake",
]

FrontMessage = (
    TrainerHello
    | OpenVersion
    | ManifestPart
    | Chunk
    | Seal
    | Abandon
    | Watch
    | TrainerBye
    | Ping
    | StatusRequest
    | PushRequest
    | EngineAdd
    | EngineRemove
)
    | TrainerRollback
    | TrainerWait
"""What the daemon's front door takes, from trainers and operators."""

FrontReply = (
    TrainerWelcome
    | RollbackRequest
    | WaitRequest
    | VersionOpened
    | ChunkDone
    | VersionStatus
    | StatusReply
    | PushReply
    | Done
    | Farewell
    | Pong
    | ErrorReply
)
"""What a trainer or an operator gets."""

    | WaitReply
WorkerMessage = WorkerHello | StepDone | StepFailed | WorkerBye | Ping
"""What engine workers send."""

WorkerCommand = (
    WorkerWelcome
    | OpenSlots
    | CloseSlots
    | Expect
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

"""What the recorded frames of protocol 1 say: one message by tag with as little as it needs, and one with every field.

A field that is added later has a default, so these stay as they are for ever; only a message type that is new to a
protocol is new here, and then in that protocol's own folder.
"""

from __future__ import annotations

from typing import Final

from cpe_daemon.core.types import Shard, TensorSpec, VersionId
from cpe_daemon.wire.messages import (
    Abandon,
    Abort,
    Begin,
    Check,
    Chunk,
    ChunkDone,
    CloseSlots,
    Digested,
    Done,
    EngineAdd,
    EngineRemove,
    EngineSpec,
    ErrorReply,
    EvictRequest,
    Expect,
    Farewell,
    Finish,
    Halt,
    Load,
    ManifestPart,
    Message,
    OpenSlots,
    OpenVersion,
    Pause,
    Ping,
    Pong,
    PushReply,
    PushRequest,
    Resume,
    RollbackRequest,
    Seal,
    SlotSet,
    StatusReply,
    StatusRequest,
    StepDone,
    StepFailed,
    TensorPart,
    TrainerBye,
    TrainerHello,
    TrainerRollback,
    TrainerWait,
    TrainerWelcome,
    VersionOpened,
    VersionStatus,
    WaitReply,
    WaitRequest,
    Wake,
    Watch,
    WorkerBye,
    WorkerHello,
    WorkerState,
    WorkerWelcome,
)
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport

_ID: Final = VersionId("policy", "run-7", 42)
_ERROR: Final = ErrorInfo("engine", "engine 'a' rank 1 (pid 17, GPU shm-0) could not load: a bucket of round 3")
_SHARDS: Final = [
    Shard("embed.weight", "bfloat16", (151_936, 1024)),
    Shard("layers.0.experts.w1", "float8_e4m3fn", (128, 768, 2048), (64, 0, 0), (32, 768, 2048)),
    Shard("scale", "float32", ()),
]
_ENGINES: Final = {
    "a": EngineReport("updated", {"pause": 0.25, "push": 1.5}, 4096, 16.5),
    "b": EngineReport("quarantined", {}, 0, 0.0, _ERROR),
}

SAMPLES: Final[dict[str, tuple[Message, Message]]] = {
    "error": (
        ErrorReply(ErrorInfo("protocol", "say hello first")),
        ErrorReply(ErrorInfo("digest", "the bytes of w differ"), stream=3),
    ),
    "ping": (Ping(), Ping()),
    "pong": (Pong("5f0c"), Pong("5f0c1ad2e3b49687")),
    "trainer_hello": (
        TrainerHello(1, "policy", "run-7", 0, 1),
        TrainerHello(1, "policy", "run-7", 3, 8, boot_id="8d0a9b26-2a4f", pid=4_194_304),
    ),
    "open_version": (OpenVersion(1, _ID, 3, 1024), OpenVersion(1, _ID, 1_000_000, 1 << 40, force=True)),
    "manifest_part": (ManifestPart(1, 0, []), ManifestPart(1, 4096, _SHARDS)),
    "chunk": (Chunk(1, 0, 4096), Chunk(1, 1 << 40, 4_194_304, ring_offset=8_388_608)),
    "seal": (Seal(1, b""), Seal(1, bytes(range(32)))),
    "abandon": (Abandon(1, ""), Abandon(1, "the trainer's step failed: \N{SNOWMAN}")),
    "trainer_bye": (TrainerBye(), TrainerBye()),
    "watch": (Watch(_ID), Watch(VersionId("draft", "", 0))),
    "trainer_welcome": (
        TrainerWelcome(1, "5f0c", 1.0, 16, 4_194_304),
        TrainerWelcome(1, "5f0c", 0.5, 8, 65_536, handoff="/run/cpe/handoff.sock", landing_token=bytes(range(32))),
    ),
    "version_opened": (VersionOpened(1), VersionOpened(1 << 40)),
    "chunk_done": (ChunkDone(1), ChunkDone(1, ring_offset=4_194_304)),
    "version_status": (
        VersionStatus(_ID, "receiving"),
        VersionStatus(_ID, "live", _ERROR, VersionReport(_ID, 1 << 34, 400, 2.5, 0.25, _ENGINES)),
    ),
    "status_request": (StatusRequest(), StatusRequest(protocol=2)),
    "status_reply": (
        StatusReply({}),
        StatusReply({"daemon": {"pid": 1, "uptime_seconds": 2.5}, "versions": [None, True, "x", -1]}),
    ),
    "worker_hello": (
        WorkerHello(1, "a", "torch", 0, 1, "0c9e"),
        WorkerHello(
            1,
            "a",
            "torch",
            1,
            2,
            "0c9e",
            "policy",
            "node-3",
            "GPU-9c1f",
            leader=False,
            pid=17,
            content=_ID,
            touched=True,
        ),
    ),
    "step_done": (StepDone(3, "load"), StepDone(3, "abort", 7, 0.125, touched=True)),
    "step_failed": (StepFailed(3, "finish", _ERROR), StepFailed(3, "load", _ERROR, 7)),
    "worker_bye": (WorkerBye(), WorkerBye()),
    "worker_welcome": (
        WorkerWelcome(1, "5f0c", 1.0, bytes(range(32)), "/run/cpe/handoff.sock"),
        WorkerWelcome(1, "5f0c", 1.0, b"t" * 32, "", hold=True),
    ),
    "open_slots": (
        OpenSlots(4, SlotSet("shm", "shm-0", 3, 4096, [bytes(range(32))])),
        OpenSlots(5, SlotSet("cuda", "GPU-9c1f", 2, 1 << 28, [b"a" * 64]), folds=True),
    ),
    "close_slots": (
        CloseSlots(6),
        CloseSlots(1 << 40),
    ),
    "pause": (Pause(3, 60.0), Pause(3, 0.001)),
    "expect": (Expect(3, 0, 0, []), Expect(1 << 40, 4096, 4097, [TensorSpec("w", "bfloat16", (2, 3))])),
    "digested": (Digested(_ID, b""), Digested(_ID, bytes(range(16)))),
    "check": (Check(3), Check(-1)),
    "halt": (Halt(3), Halt(1 << 40)),
    "wake": (Wake(1, 60.0), Wake(1 << 40, 0.001)),
    "worker_state": (WorkerState(True), WorkerState(False, _ID, touched=True, digest=bytes(range(16)))),
    "begin": (Begin(3, _ID, 400, 1 << 34), Begin(1 << 40, _ID, 1, 0, (1 << 64) - 1)),
    "load": (
        Load(3, 0, 0, []),
        Load(
            3,
            7,
            2,
            [
                TensorPart("embed.weight", "bfloat16", (151_936, 1024), 1 << 28, 43_024_384, 0),
                TensorPart("scale", "float32", (), 0, 4, 43_024_384),
            ],
        ),
    ),
    "finish": (Finish(3), Finish(1 << 40)),
    "abort": (Abort(3, ""), Abort(3, "no engine is left in round 3")),
    "resume": (Resume(3), Resume(3, _ID)),
    "push_request": (PushRequest("policy"), PushRequest("policy", "run-7", 12, ("vllm-0", "vllm-1"))),
    "push_reply": (
        PushReply(VersionReport(_ID, 1 << 34, 400, 2.5, 0.25, _ENGINES)),
        PushReply(VersionReport(_ID, 0, 0)),
    ),
    "rollback_request": (RollbackRequest(), RollbackRequest("policy", "run-7", 41)),
    "evict_request": (EvictRequest("polciy"), EvictRequest("policy", "run-7", 41)),
    "wait_request": (WaitRequest(42, 600.0), WaitRequest(0, 0.5, "policy", "run-7")),
    "wait_reply": (WaitReply(_ID), WaitReply(_ID, stream=-3)),
    "trainer_rollback": (TrainerRollback(-1), TrainerRollback(-(1 << 40), 41, "run-6")),
    "trainer_wait": (TrainerWait(-1, 42, 600.0), TrainerWait(-2, 0, 0.5, "run-6")),
    "engine_add": (
        EngineAdd(EngineSpec("e0", "torch")),
        EngineAdd(EngineSpec("vllm-0", "vllm", "policy", "http://127.0.0.1:8000", 8)),
    ),
    "engine_remove": (EngineRemove("e0"), EngineRemove("vllm-0")),
    "done": (Done(), Done("expects engine 'e0'")),
    "farewell": (Farewell(""), Farewell("SIGTERM")),
}

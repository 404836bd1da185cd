"""Every setting of the daemon, with its unit, default, bounds and meaning. Only this decides what is valid.

The descriptions are for operators: ``cpe config --default`` and ``configs/default.yaml`` are made of them.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from cpe_daemon.config.bootstrap import BootstrapConfig
from cpe_daemon.config.deadlines import DeadlinesConfig
from cpe_daemon.config.endpoints import check_absolute, check_endpoint, check_runtime_dir
from cpe_daemon.config.http import HttpConfig
from cpe_daemon.config.models import ModelConfig, ModelName, named_section
from cpe_daemon.config.paths import (
    ENGINES_SOCKET,
    FRONT_SOCKET,
    HANDOFF_SOCKET,
    default_runtime_dir,
    default_state_dir,
)
from cpe_daemon.config.push import PushConfig
from cpe_daemon.config.section import GIB, KIB, MIB, TIB, Bytes, Seconds, Section
from cpe_daemon.config.security import SecurityConfig
from cpe_daemon.config.sources import NAME
from cpe_daemon.core.types import ALIGNMENT_BYTES

_FEWEST: Final = 3
"""Slots at the least, if their number is left to the daemon: with fewer the stages of a push do not overlap."""


def _checked_endpoint(endpoint: str) -> str:
    check_endpoint(endpoint)
    return endpoint


def _split(value: object) -> object:
    """Take a list as an environment variable or a flag spells it: as JSON does, or with commas between."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            return json.loads(text)
        except ValueError:
            text = text[1:-1]  # a shell has taken the quotes away
    return [part.strip() for part in text.split(",") if part.strip()]


def _slots(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"is a number, or auto, not {str(value).lower()}")
    return 0 if value == "auto" else value


def _off(value: object) -> object:
    """Take what YAML makes of a bare off for the word."""
    return "off" if value is False else value


class ArenaConfig(Section):
    """The arena: the host memory that holds every version on this node."""

    size_bytes: Bytes = Field(
        default=4 * GIB,
        ge=MIB,
        le=64 * TIB,
        description="Taken whole at start. Twice a model's weights allow one version to be received while "
        "another is served and restored from; three times keep a previous one for rollback as well.",
    )
    prefault_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Threads that touch every page at start, so that no trainer waits for it. 0: one a core, "
        "at most 8.",
    )

    numa: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = Field(
        default="auto",
        description="cuda: auto stripes the arena over the NUMA nodes that GPUs are beside, if there are several, so "
        "that each pulls its part of a version from memory near to it. off: pages lie wherever the kernel puts them.",
    )

    @property
    def prefault_thread_count(self) -> int:
        """Threads to start: ``prefault_threads``, with 0 resolved for this process's cores."""
        return self.prefault_threads or min(8, len(os.sched_getaffinity(0)))


class IngestConfig(Section):
    """How trainers reach the daemon, and what they may send."""

    listen: tuple[Annotated[str, AfterValidator(_checked_endpoint)], ...] = Field(
        default=(),
        description="Endpoints for trainers and operators besides ipc://<runtime_dir>/front.sock, which is always "
        'there. tcp://ADDRESS:PORT or ipc:///PATH, for example ["tcp://0.0.0.0:5555"]; tcp takes only clients whose '
        "keys are allowed (`cpe keys`).",
    )
    insecure: bool = Field(
        default=False,
        description="Listen on tcp without keys: no encryption, and whoever reaches an endpoint can replace the "
        "weights that are served.",
    )
    messages_per_second: int = Field(
        default=10_000,
        ge=10,
        le=10_000_000,
        description="What one client may send, a chunk being one message; more is refused. Raise it for chunks "
        "far smaller than 1MiB.",
    )
    credits: int = Field(
        default=4,
        ge=1,
        le=4096,
        description="Chunks that a trainer rank may have unacknowledged over ZeroMQ: with chunk_bytes, this "
        "bounds the memory of the daemon that one rank can fill.",
    )
    chunk_bytes: Bytes = Field(
        default=16 * MIB,
        ge=4 * KIB,
        le=64 * MIB,
        description="Largest chunk over ZeroMQ. Smaller ones cost more messages, larger ones more cache.",
    )
    landing_credits: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Places in the landing ring, the shared memory of a trainer rank on the same host.",
    )
    landing_chunk_bytes: Bytes = Field(
        default=16 * MIB,
        ge=4 * KIB,
        le=GIB,
        description="Size of one place in the landing ring. Larger ones cost fewer wake-ups.",
    )
    copy_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Threads that copy chunks into the arena and compute digests. 0: one a core, at most 16.",
    )
    max_tensors: int = Field(
        default=1_000_000,
        ge=1,
        le=10_000_000,
        description="Most shards that one rank may contribute to a version.",
    )
    max_trainers: int = Field(
        default=1024, ge=1, le=65_536, description="Most trainer ranks that may be connected at once."
    )

    @field_validator("listen", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        return _split(value)

    @property
    def copy_thread_count(self) -> int:
        """Threads to start: ``copy_threads``, with 0 resolved for this process's cores."""
        return self.copy_threads or min(16, len(os.sched_getaffinity(0)))


class DeviceConfig(Section):
    """The slots through which weights reach engine workers. A GPU gets them when a worker attaches that uses it."""

    kind: Literal["shm", "cuda"] = Field(
        default="shm",
        description="shm: slots in shared memory, for engines on the CPU. cuda: in the memory of NVIDIA GPUs; the "
        "arena is pinned.",
    )
    uuids: tuple[str, ...] = Field(
        default=(),
        description='cuda: the GPUs to serve, by UUID or its beginning, as `nvidia-smi -L` prints it: ["GPU-9c1f"]. '
        "None: all that the daemon sees.",
    )
    gpus: int = Field(default=1, ge=1, le=8, description="shm: sets of slots, as if each were a GPU.")
    slots: Annotated[int, BeforeValidator(_slots)] = Field(
        default=3,
        ge=0,
        le=4096,
        description="Slots a GPU. Three let copies from the host, copies between GPUs and loads run at once, and a "
        "fourth keeps the links busy when one of these is late; with more, engines pause for a shorter time, for they "
        "fill before the pause. auto, or 0: as many as hold a version, within auto_bytes. Where memory is short, fewer "
        "are taken.",
    )
    slot_bytes: Bytes = Field(
        default=256 * MIB,
        ge=4 * KIB,
        le=16 * GIB,
        description=f"Size of a slot, a multiple of {ALIGNMENT_BYTES}. A larger tensor travels in several.",
    )
    auto_bytes: Bytes = Field(
        default=2 * GIB,
        ge=4 * KIB,
        le=TIB,
        description="Most memory of a GPU that slots take with slots: auto.",
    )
    idle_seconds: Seconds = Field(
        default=600.0,
        ge=0.0,
        le=86_400.0,
        description="Slots are given back when no version was pushed for so long, so that others have the memory, and "
        "taken again for the next one. 0: never.",
    )
    verify: bool | Literal["auto"] = Field(
        default="auto",
        description="Have every worker compare what it is handed, before it is served, with what was staged: a "
        "checksum of all bytes that reads them once more, on the GPU and as they are received. auto: where that is "
        "cheap, with cuda.",
    )

    @field_validator("uuids", mode="before")
    @classmethod
    def _split_uuids(cls, value: object) -> object:
        return _split(value)

    @property
    def verifies(self) -> bool:
        """Whether workers verify what they load: ``verify``, with auto resolved."""
        return self.kind == "cuda" if self.verify == "auto" else self.verify

    def slots_for(self, buckets: int) -> int:
        """How many slots a GPU is to have for a version of so many buckets."""
        return self.slots or max(_FEWEST, min(buckets, self.auto_bytes // self.slot_bytes))

    @field_validator("slot_bytes")
    @classmethod
    def _aligned(cls, value: int) -> int:
        if value % ALIGNMENT_BYTES:
            below = value - value % ALIGNMENT_BYTES
            raise ValueError(
                f"{value} is not a multiple of {ALIGNMENT_BYTES}; write {below} or {below + ALIGNMENT_BYTES}"
            )
        return value


class RetentionConfig(Section):
    """What is kept once a newer version is live."""

    versions: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Previous versions of each model kept for rollback, room permitting.",
    )


class LogConfig(Section):
    """What the daemon says of itself, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least important events that are written."
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: console on a terminal, json elsewhere."
    )


class Config(Section):
    """All settings of one daemon."""

    runtime_dir: Path = Field(
        default_factory=default_runtime_dir,
        description="Holds the daemon's sockets; one daemon a directory. Default: /run/cpe for root and "
        "where it exists, else $XDG_RUNTIME_DIR/cpe, else /tmp/cpe-<uid>.",
    )
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="Holds what the daemon shall know after a restart: the engines of `cpe engine add`, and a journal "
        "of versions and engines; one daemon a directory. Made when first needed. Default: /var/lib/cpe-daemon for "
        "root and who may write to it, else $XDG_STATE_HOME/cpe, else ~/.local/state/cpe.",
    )
    node: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        max_length=255,
        description="Name of this node in logs and to engines. Default: the host's name.",
    )
    arena: ArenaConfig = Field(default_factory=ArenaConfig)
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)
    device: DeviceConfig = Field(default_factory=DeviceConfig)
    push: PushConfig = Field(default_factory=PushConfig)
    retention: RetentionConfig = Field(default_factory=RetentionConfig)
    models: dict[ModelName, ModelConfig] = Field(
        default_factory=dict, description="Models that differ from the others, by the names that trainers give them."
    )
    bootstrap: BootstrapConfig = Field(default_factory=BootstrapConfig)
    deadlines: DeadlinesConfig = Field(default_factory=DeadlinesConfig)
    http: HttpConfig = Field(default_factory=HttpConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("runtime_dir")
    @classmethod
    def _usable_runtime_dir(cls, value: Path) -> Path:
        check_runtime_dir(value)
        return value

    @field_validator("state_dir")
    @classmethod
    def _usable_state_dir(cls, value: Path) -> Path:
        check_absolute(value)
        return value

    @field_validator("ingest")
    @classmethod
    def _distinct_endpoints(cls, value: IngestConfig, info: ValidationInfo) -> IngestConfig:
        taken = {
            f"ipc://{info.data.get('runtime_dir')}/{name}" for name in (FRONT_SOCKET, ENGINES_SOCKET, HANDOFF_SOCKET)
        }
        for endpoint in value.listen:
            if endpoint in taken:
                raise ValueError(f"listen names {endpoint}, which is there already; remove it")
            if not endpoint.endswith(":0"):
                taken.add(endpoint)
        return value

    @property
    def front_endpoint(self) -> str:
        """The endpoint that is always there."""
        return f"ipc://{self.runtime_dir / FRONT_SOCKET}"

    @property
    def front_endpoints(self) -> tuple[str, ...]:
        """Every endpoint for trainers and operators, as configured."""
        return (self.front_endpoint, *self.ingest.listen)


def settings() -> dict[tuple[str, ...], Any]:
    """Return every setting's pydantic field by its path, such as ``("device", "slots")``; no sections.

    Where a name may be any, it is `NAME`: ``("models", "NAME", "versions")``.
    """
    found: dict[tuple[str, ...], Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.update({(name, inner): entry for inner, entry in section.model_fields.items()})
        elif named := named_section(section):
            found.update({(name, NAME, inner): entry for inner, entry in named.model_fields.items()})
        else:
            found[name,] = field
    return found

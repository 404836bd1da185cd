"""What the demo needs of the host's memory and disk, and what the host has: it shrinks its model, or refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cpe_daemon.config import IngestConfig
from cpe_daemon.core.types import align
from cpe_daemon.demo.architecture import QWEN3_600M, SMALL, Architecture
from cpe_daemon.demo.options import Options
from cpe_daemon.devices.capacity import available_bytes
from cpe_daemon.errors import ResourceError

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_FULL_SLOT_BYTES: Final = 64 * _MIB
_SMALLEST_SLOT_BYTES: Final = 256 << 10
_BUCKETS: Final = 17
_RING_BYTES: Final = IngestConfig().landing_credits * IngestConfig().landing_chunk_bytes
_PROCESS_BYTES: Final = 400 * _MIB
"""Of a Python process that imported torch."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The daemon's memory, as configs/demo.yaml has it for Qwen3-0.6B, in proportion to the model."""

    arena_bytes: int
    slots: int
    slot_bytes: int

    @classmethod
    def of(cls, architecture: Architecture) -> Sizes:
        """Room for two versions of the model and some more; slots that it takes many of."""
        arena = architecture.nbytes * 29 // 10
        grain = _GIB // 4 if arena > _GIB else _MIB
        slot = min(max(architecture.nbytes // _BUCKETS, _SMALLEST_SLOT_BYTES), _FULL_SLOT_BYTES)
        return cls(max(-(-arena // grain) * grain, 16 * _MIB), 3, align(slot))


def needed_bytes(architecture: Architecture, ranks: int) -> int:
    """Memory that the demo takes at its peak: arena, slots, the trainer, the engine, and the processes themselves."""
    sizes = Sizes.of(architecture)
    split = architecture.largest_nbytes if architecture.largest_nbytes > sizes.slot_bytes else 0
    daemon = sizes.arena_bytes + sizes.slots * sizes.slot_bytes + _RING_BYTES
    return daemon + 2 * architecture.nbytes + ranks * split + (ranks + 1) * _PROCESS_BYTES


def choose(options: Options, ranks: int, directory: Path) -> tuple[Architecture, str]:
    """Return the largest model that was asked for and fits this host; and what to say if it is another one.

    Args:
        options: what was asked for.
        ranks: of the engine.
        directory: where the checkpoint will be written.

    Raises:
        ResourceError: not even the smallest fits; says what is lacking.
    """
    wanted = SMALL if options.small else QWEN3_600M.scaled(options.scale)
    memory, disk = available_bytes(), shutil.disk_usage(directory).free
    in_memory = is_in_memory(directory)
    for candidate in _candidates(wanted, options):
        need = needed_bytes(candidate, ranks) + (candidate.nbytes if in_memory else 0)
        if need <= memory and candidate.nbytes * 11 // 10 <= disk:
            return candidate, "" if candidate == wanted else _shrunk(wanted, ranks, memory, disk)
    need = needed_bytes(SMALL, ranks)
    raise ResourceError(
        f"even the demo's smallest model takes {need / 1e9:.1f} GB of memory and {SMALL.nbytes / 1e9:.2f} GB in"
        f" {directory}; this host has {memory / 1e9:.1f} GB and {disk / 1e9:.2f} GB free"
    )


def is_in_memory(directory: Path) -> bool:
    """Whether what is written to a directory takes memory."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    real = directory.resolve()
    holding = [(len(point), kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(holding, default=(0, ""))[1] in {"tmpfs", "ramfs"}


def _candidates(wanted: Architecture, options: Options) -> Iterator[Architecture]:
    yield wanted
    fraction = 0.0 if options.small else options.scale / 2
    while fraction > 0.02:
        yield QWEN3_600M.scaled(fraction)
        fraction /= 2
    yield SMALL


def _shrunk(wanted: Architecture, ranks: int, memory: int, disk: int) -> str:
    return (
        f"a smaller model than asked for: that one takes {needed_bytes(wanted, ranks) / 1e9:.1f} GB of memory and"
        f" {wanted.nbytes / 1e9:.1f} GB of disk, of which {memory / 1e9:.1f} and {disk / 1e9:.1f} GB are free"
    )

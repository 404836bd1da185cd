"""``python -m benchmarks.push``: how long a staged version takes to be live in an engine, beside bare copies.

A real daemon (``cpe serve``), a real engine worker in torch, and a publisher, each a process; the seconds are the
daemon's own, from staged to live. Beside them the floor (`benchmarks.floor`) streams the same buckets through slots of
the same size. The runs of both alternate, and ``ratio`` is of their medians. On GPUs `benchmarks.gpu.push` measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from benchmarks import push_observability, push_rollback, report
from benchmarks.arguments import positive
from benchmarks.bystanders import Bystanders, remark
from benchmarks.gpu import push as gpu_push
from benchmarks.host import SERVE, FloorProcess, Host, Setting, Weights
from benchmarks.models import DENSE, MODELS
from cpe_daemon.core.types import ALIGNMENT_BYTES
from cpe_daemon.demo.memory import Sizes
from cpe_daemon.demo.signals import Interruption
from cpe_daemon.errors import CpeError
from cpe_daemon.wire.reports import VersionReport

_WARM_UPS: Final = 2
_MIB: Final = 1 << 20
_GPU_SLOT_BYTES: Final = 256 * _MIB
_SMALLEST_SLOT_BYTES: Final = 4096
_SHAPES: Final = ((1, 1), (2, 1), (2, 2))
"""Workers and sets of slots: the first is what the ratio is of."""

_EPILOG: Final = """\
examples:
  python -m benchmarks.push
  python -m benchmarks.push --updates 15 --rows one     # one worker and one set of slots, longer
  python -m benchmarks.push --slot-mib 16 --slots 4     # other slots, for the floor as well
  python -m benchmarks.push --observability             # what metrics and logs cost
  python -m benchmarks.push --rollback                  # what bringing the version before back costs, beside a push
  python -m benchmarks.push --quick                     # some megabytes, to see that it works
  python -m benchmarks.push --device cuda --model 8b --gpus 2               # one engine of two ranks
  python -m benchmarks.push --device cuda --model 8b --gpus 2 --engines each
  python -m benchmarks.push --device cuda --model 8b --gpus 2 --table pause
  python -m benchmarks.push --device cuda --model 8b --source gpu --trace push.json
  python -m benchmarks.push --device cuda --set device.verify=false         # what the check in the engines costs

Needs about 8 GB of memory for 0.6b, 40 GB for 8b and 75 GB for 32b. The last line is JSON: bench, device, bytes,
seconds (of each update) and floor_seconds (of each run of the floor), for one worker and one set of slots; ratio, of
their medians; and more. With --rollback there are rollback_seconds and rollback_ratio in the floor's stead. With cuda
also first_seconds, paused_seconds and vram_bytes, of slots and what workers took beside their weights. A shared machine
is noisy: more --updates, or several runs, tell more than one."""


@dataclass(slots=True)
class Row:
    """What was measured of one setting."""

    setting: Setting
    reports: list[VersionReport] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """From staged to live, of each update."""
        return [report.push_seconds for report in self.reports]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return report.ratio(self.seconds, self.floor_seconds)

    @property
    def phases(self) -> dict[str, float]:
        """The median of each phase of the engine's, in seconds."""
        engines = [engine for report in self.reports for engine in report.engines.values()]
        names = dict.fromkeys(phase for engine in engines for phase in engine.phases)
        return {name: statistics.median([engine.phases.get(name, 0.0) for engine in engines]) for name in names}

    @property
    def paused(self) -> float:
        """For how long the engine did not serve: everything but the prefetch."""
        return sum(seconds for phase, seconds in self.phases.items() if phase != "prefetch")


def measure(
    setting: Setting,
    weights: Weights,
    floor: FloorProcess,
    directory: Path,
    updates: int,
    serve: Sequence[str] = SERVE,
) -> Row:
    """Push ``updates`` versions, and run the floor as often, in turn; what the engine holds then has to be right."""
    row = Row(setting)
    with Host(setting, directory, serve) as host:
        for _ in range(_WARM_UPS):
            host.update(weights)
            floor.run()
        for _ in range(updates):
            row.reports.append(host.update(weights))
            row.floor_seconds.append(floor.run())
        host.check(weights)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    asked = _parse(arguments)
    with Interruption() as interruption, tempfile.TemporaryDirectory(prefix="cpe-bench-") as directory:
        interruption.arm()
        try:
            if asked.device == "cuda":
                gpu_push.run(asked, Path(directory))
                return 0
            setting = Setting(asked.model, asked.slots, asked.slot_bytes)
            if asked.rollback:
                push_rollback.run(setting, Path(directory) / "host", asked.updates)
            elif asked.observability:
                push_observability.run(setting, Path(directory), asked.updates)
            else:
                shapes = _SHAPES if asked.rows == "all" else _SHAPES[:1]
                _run(setting, Path(directory), asked.updates, shapes, asked.trace)
        except CpeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _run(
    setting: Setting, directory: Path, updates: int, shapes: Sequence[tuple[int, int]], trace: Path | None
) -> None:
    traced = (*SERVE, "--trace", str(trace.absolute())) if trace else SERVE
    bystanders, weights = Bystanders(), Weights(setting.architecture)
    with FloorProcess(setting, directory) as floor:
        buckets = floor.ready()
        rows: list[Row] = []
        for workers, gpus in shapes:
            made = replace(setting, workers=workers, gpus=gpus)
            serve = traced if not rows else SERVE
            rows.append(measure(made, weights, floor, directory / f"{workers}-{gpus}", updates, serve))
    others_share, first = bystanders.share(), rows[0]
    _show(rows, weights.nbytes, buckets, others_share)
    report.finish(
        report.compared(
            "push",
            device="shm",
            nbytes=weights.nbytes,
            seconds=first.seconds,
            floor_seconds=first.floor_seconds,
            model=setting.model,
            slots=setting.slots,
            slot_bytes=setting.slot_bytes,
            buckets=buckets,
            paused_seconds=round(first.paused, 6),
            phases={phase: round(seconds, 6) for phase, seconds in first.phases.items()},
            rows=[_plain(row) for row in rows[1:]],
            others_share=round(others_share, 4),
        )
    )


def _show(rows: Sequence[Row], nbytes: int, buckets: int, others_share: float) -> None:
    setting = rows[0].setting
    slots = f"{setting.slots} slots of {setting.slot_bytes / _MIB:g} MiB"
    report.show(
        f"Push of {nbytes / 1e9:.3f} GB ({setting.model}, bfloat16) on shm: {slots}, {buckets} buckets",
        ("workers, sets of slots", "staged to live", "rate", "not serving", "floor", "ratio"),
        [
            (
                f"{row.setting.workers}, {row.setting.gpus}",
                report.spread(row.seconds),
                report.rate(nbytes, row.seconds),
                f"{row.paused:.3f} s",
                report.spread(row.floor_seconds),
                f"{row.ratio:.2f}",
            )
            for row in rows
        ],
        notes=[
            f"medians of {len(rows[0].seconds)}, with the least and the most; the engine then held what was published,"
            " bit by bit",
            "one worker: " + ", ".join(f"{phase} {seconds * 1e3:.1f} ms" for phase, seconds in rows[0].phases.items()),
            "the floor is that of one worker and one set of slots in every row: the others copy more, on the same"
            " cores",
            remark(others_share),
        ],
    )


def _plain(row: Row) -> dict[str, object]:
    return {
        "workers": row.setting.workers,
        "gpus": row.setting.gpus,
        "seconds": report.rounded(row.seconds),
        "floor_seconds": report.rounded(row.floor_seconds),
        "ratio": round(row.ratio, 4),
        "paused_seconds": round(row.paused, 6),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.push",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=["shm", "cuda"], default="shm", help="shm: shared memory, an engine on the CPU; cuda: GPUs"
    )
    parser.add_argument("--model", choices=sorted(MODELS), help="whose names and shapes (0.6b; 8b with cuda)")
    parser.add_argument("--updates", type=positive, default=9, metavar="N", help="versions that are timed (9)")
    parser.add_argument("--slots", type=_slots, default=3, metavar="N", help="slots of each set or GPU, or auto (3)")
    parser.add_argument(
        "--slot-mib",
        type=_slot_bytes,
        dest="slot_bytes",
        metavar="MIB",
        help="size of a slot (64, less if the model is small; 256 with cuda)",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what the daemon's stages did, for Perfetto")
    parser.add_argument("--quick", action="store_true", help="a small model and two updates, to see that it works")
    on_cpu = parser.add_argument_group("with --device shm")
    on_cpu.add_argument(
        "--rows",
        choices=["one", "all"],
        help="one: one worker and one set of slots; all: two of either as well (all; with --quick, one)",
    )
    on_cpu.add_argument(
        "--observability",
        action="store_true",
        help="what metrics, logs and scrapes cost: a daemon with them beside one without",
    )
    on_cpu.add_argument(
        "--rollback", action="store_true", help="what it costs to bring the version before back, beside a push"
    )
    on_gpu = parser.add_argument_group("with --device cuda")
    on_gpu.add_argument("--gpus", type=positive, default=1, metavar="N", help="how many take part (1)")
    on_gpu.add_argument(
        "--engines", choices=["tp", "each"], default="tp", help="tp: one, a rank on each GPU; each: one on each GPU"
    )
    on_gpu.add_argument("--source", choices=["host", "gpu"], default="host", help="where the trainer's tensors are")
    on_gpu.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemon"
    )
    on_gpu.add_argument("--table", choices=["pause"], help="pause: against slots, from one up to all")
    asked = _completed(parser.parse_args(arguments))
    if asked.device == "shm" and (asked.model not in DENSE or asked.slots == "auto"):
        parser.error("--device shm takes --model 0.6b or small, and a number of --slots")
    return asked


def _completed(asked: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device."""
    on_gpu = asked.device == "cuda"
    if asked.quick:
        asked.model, asked.updates, asked.rows = "0.6b" if on_gpu else "small", 2, asked.rows or "one"
    asked.model = asked.model or ("8b" if on_gpu else "0.6b")
    asked.rows = asked.rows or "all"
    asked.slot_bytes = asked.slot_bytes or (_GPU_SLOT_BYTES if on_gpu else Sizes.of(MODELS[asked.model]).slot_bytes)
    return asked


def _slots(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def _slot_bytes(text: str) -> int:
    nbytes = int(float(text) * _MIB) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    if nbytes < _SMALLEST_SLOT_BYTES:
        raise argparse.ArgumentTypeError(f"a slot has {_SMALLEST_SLOT_BYTES >> 10} KiB at least")
    return nbytes


if __name__ == "__main__":
    sys.exit(main())

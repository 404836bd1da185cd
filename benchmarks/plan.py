"""``python -m benchmarks.plan``: how long it takes to plan a push of a model of 140,000 tensors.

Trainer ranks have each contributed whole tensors, which lie in as many extents of the arena; the same number of GPUs is
to get all of them. A plan is made from the merged manifest to each GPU's list of copies, for every bucket: which bytes
it pulls from the arena, and which it takes from which other GPU. Every plan is then checked, byte by byte, by
arithmetic of the benchmark's own (`benchmarks.plan_check`); that is not in ``seconds``.

Every run plans from nothing. A daemon keeps a model's cut, so that it plans the versions after the first one by
``assign`` alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks import kimi, report
from benchmarks.plan_check import Checker, WrongPlanError
from cpe_daemon.core.manifest import Manifest, layout, merge
from cpe_daemon.core.plan import HERE, Base, Gpu, Plan, Topology, assign, cut
from cpe_daemon.core.stripes import stripes
from cpe_daemon.core.types import VersionId

_MIB: Final = 1 << 20
_QUICK_LAYERS: Final = 3
_EPILOG: Final = """\
spreads:
  experts   as expert parallelism leaves them: a rank has a run of each layer's experts, and a share of the rest
  tensors   tensor after tensor to the next rank: no two neighbours lie together, so every tensor is a copy of its own

examples:
  python -m benchmarks.plan --model kimi-k2
  python -m benchmarks.plan --model kimi-k2 --spread tensors --runs 15
  python -m benchmarks.plan --ranks 8 --numa-nodes 2     # a host of two sockets: GPUs pull from memory near to them
  python -m benchmarks.plan --quick                      # three layers, to see that it works

The last line is JSON: bench, model, tensors, ranks, buckets, copies, bytes, seconds (of each run, from the manifest to
all plans: cut_seconds + assign_seconds), median_seconds, and validate_seconds, of the check. A check that fails ends
the benchmark with an error."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is planned.

    Attributes:
        manifest: of the version.
        bases: by trainer rank, where its extent begins.
        slot_bytes: size of a slot.
        topology: the GPUs.
    """

    manifest: Manifest
    bases: Sequence[Base]
    slot_bytes: int
    topology: Topology


@dataclass(slots=True)
class Figures:
    """Seconds of each run by step, and what the last plan is made of."""

    cut: list[float] = field(default_factory=list)
    assign: list[float] = field(default_factory=list)
    validate: list[float] = field(default_factory=list)
    buckets: int = 0
    pulls: int = 0
    exchanges: int = 0

    @property
    def seconds(self) -> list[float]:
        """Of each run, from the manifest to the plans."""
        return [sum(steps) for steps in zip(self.cut, self.assign, strict=True)]


def make_case(layers: int, ranks: int, spread: str, slot_bytes: int, numa_nodes: int) -> Case:
    """Have each rank contribute its tensors, and lay the extents out one after another."""
    contributions = kimi.SPREADS[spread](kimi.tensors(layers), ranks)
    manifest = merge(VersionId("kimi-k2", "bench", 1), contributions)
    bases: list[Base] = []
    end = 0
    for shards in contributions:
        bases.append(Base(HERE, end))
        end += layout(shards).nbytes
    return Case(manifest, bases, slot_bytes, _topology(ranks, numa_nodes, end, slot_bytes))


def _topology(gpus: int, numa_nodes: int, arena_bytes: int, slot_bytes: int) -> Topology:
    """GPUs that reach one another; with several NUMA nodes, equal numbers of them, and the arena's stripes, on each."""
    if numa_nodes == 1:
        return Topology(tuple(Gpu(f"GPU-{gpu}") for gpu in range(gpus)), peer_access=True)
    nodes = [gpu * numa_nodes // gpus for gpu in range(gpus)]
    placed = tuple(Gpu(f"GPU-{gpu}", node) for gpu, node in enumerate(nodes))
    return Topology(placed, peer_access=True, regions=stripes(arena_bytes, nodes, slot_bytes))


def measure(case: Case, runs: int) -> Figures:
    """Plan so many times from nothing, and check every plan.

    Raises:
        WrongPlanError: one does not bring each byte to each GPU exactly once.
    """
    figures = Figures()
    for _ in range(runs):
        gc.collect()  # the run before left 16 plans of many parts: their end is not this run's
        plan = _plan(case, figures)
        began = time.perf_counter()
        arrived = Checker(plan, case.manifest.tensors, case.bases).check()
        figures.validate.append(time.perf_counter() - began)
        if arrived != case.manifest.nbytes:
            raise WrongPlanError(f"{arrived} of {case.manifest.nbytes} bytes arrive")
        figures.buckets = len(plan.buckets)
        figures.pulls = sum(len(pulls) for bucket in plan.buckets for pulls in bucket.pulls)
        figures.exchanges = sum(len(copies) for bucket in plan.buckets for copies in bucket.exchanges)
    return figures


def _plan(case: Case, figures: Figures) -> Plan:
    began = time.perf_counter()
    made = cut([tensor.spec for tensor in case.manifest.tensors], case.slot_bytes)
    between = time.perf_counter()
    plan = assign(made, case.manifest.tensors, case.bases, case.topology)
    figures.assign.append(time.perf_counter() - between)
    figures.cut.append(between - began)
    return plan


def show(title: str, case: Case, figures: Figures) -> None:
    """Print the table."""
    tensors, gpus = len(case.manifest.tensors), len(case.topology.gpus)
    rows = [
        ("cut: tensors into buckets, once for a model", report.spread(figures.cut)),
        ("assign: buckets to copies, once for a version", report.spread(figures.assign)),
        (f"plan: both, for {gpus} ranks", report.spread(figures.seconds)),
        ("validate: every byte of every rank (not in plan)", report.spread(figures.validate)),
    ]
    report.show(
        f"{title}: {tensors:,} tensors, {case.manifest.nbytes / 1e9:,.1f} GB, from {len(case.bases)} trainer ranks"
        f" to {gpus} GPUs, {len(figures.cut)} runs",
        ("", "median (from, to)"),
        rows,
        [
            f"{figures.buckets:,} buckets of at most {case.slot_bytes // _MIB} MiB; {figures.pulls:,} copies from the"
            f" arena, {figures.exchanges:,} between GPUs; every plan was found to bring each byte to each GPU once;"
            f" {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=("kimi-k2",), default="kimi-k2", help="names and shapes (default: kimi-k2)")
    parser.add_argument("--ranks", type=int, default=16, help="trainer ranks, and GPUs to plan for (default: 16)")
    parser.add_argument("--spread", choices=sorted(kimi.SPREADS), default="experts", help="who contributes what; below")
    parser.add_argument("--slot-mib", type=int, default=256, help="size of a slot in MiB (default: 256)")
    parser.add_argument("--numa-nodes", type=int, default=1, help="over which GPUs and arena are spread (default: 1)")
    parser.add_argument("--runs", type=int, help="how many plans are made (default: 7)")
    parser.add_argument("--quick", action="store_true", help="two runs of three layers: no figures to believe")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table and the line of JSON."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    runs = asked.runs if asked.runs is not None else (2 if asked.quick else 7)
    if min(runs, asked.ranks, asked.slot_mib, asked.numa_nodes) < 1:
        parser.error("--runs, --ranks, --slot-mib and --numa-nodes take 1 or more")
    layers = _QUICK_LAYERS if asked.quick else kimi.LAYERS
    case = make_case(layers, asked.ranks, asked.spread, asked.slot_mib * _MIB, asked.numa_nodes)
    try:
        figures = measure(case, runs)
    except WrongPlanError as error:
        parser.exit(1, f"error: the plan is wrong: {error}\n")
    show(f"{asked.model}, {layers} layers, spread by {asked.spread}", case, figures)
    report.finish(
        {
            "bench": "plan",
            "model": asked.model,
            "spread": asked.spread,
            "tensors": len(case.manifest.tensors),
            "ranks": asked.ranks,
            "buckets": figures.buckets,
            "copies": figures.pulls + figures.exchanges,
            "bytes": case.manifest.nbytes,
            "seconds": report.rounded(figures.seconds),
            "median_seconds": round(statistics.median(figures.seconds), 6),
            "cut_seconds": report.rounded(figures.cut),
            "assign_seconds": report.rounded(figures.assign),
            "validate_seconds": report.rounded(figures.validate),
        }
    )


if __name__ == "__main__":
    main()

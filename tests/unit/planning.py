"""Plans for tests: of tensors at chosen addresses, cut and dealt out in one go."""

from __future__ import annotations

from collections.abc import Sequence

from cpe_daemon.core.manifest import Run, Tensor
from cpe_daemon.core.plan import HERE, Base, Plan, Topology, assign, cut
from cpe_daemon.core.types import TensorSpec

PEER = "node-7"
ARENA = (Base(HERE, 0), Base(PEER, 0), Base(HERE, 1000), Base(HERE, 20_000))
"""Extents by rank: of rank 0, which begins with the arena, of one at a peer, and of others further on."""


def in_runs(spec: TensorSpec, *runs: Run) -> Tensor:
    """A tensor in any runs."""
    return Tensor(spec, runs)


def whole(spec: TensorSpec, address: int) -> Tensor:
    """A tensor in one piece at an address of this node's arena."""
    return in_runs(spec, Run(0, spec.nbytes, 0, address))


def addresses_of(tensor: Tensor) -> list[tuple[int, int, int]]:
    """(Tensor offset, bytes, address) of a tensor's runs in this node's arena."""
    return [(run.tensor_offset, run.nbytes, ARENA[run.rank].address + run.offset) for run in tensor.runs]


def make_plan(tensors: Sequence[Tensor], *, slot_bytes: int, topology: Topology) -> Plan:
    """Plan a push from nothing, of tensors in `ARENA`."""
    return assign(cut([tensor.spec for tensor in tensors], slot_bytes), tensors, ARENA, topology)

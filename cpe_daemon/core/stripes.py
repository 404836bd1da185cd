"""How the arena is striped over the NUMA nodes that GPUs hang on, so that each pulls its part of a bucket from near.

It says where memory should lie; `cpe_daemon.arena` has the kernel put it there, or finds that it does not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import cycle, islice
from math import gcd
from typing import Final

from cpe_daemon.core.topology import Region

STRIPE_BYTES: Final = 2 << 20
"""Stripes have this size at least, and a power of two: no huge page lies on two nodes, and no stripe in two ranges that
are page-locked one by one."""

MOST_STRIPES: Final = 16_384
"""Each is a mapping of its own while the kernel provides its pages, and a process may have 65,530."""


def why_not(nodes: Sequence[int | None], memory_nodes: Collection[int]) -> str:
    """Why an arena is not to be striped for these GPUs; "" if it is.

    Args:
        nodes: by GPU, the NUMA node it hangs on, None where the host does not say.
        memory_nodes: NUMA nodes whose memory this process may have.
    """
    if None in nodes:
        return "the host does not say beside which NUMA node each GPU is"
    if len(set(nodes)) < 2:
        return "every GPU is beside the same NUMA node"
    if missing := sorted(node for node in set(nodes) if node is not None and node not in memory_nodes):
        return f"this process may have no memory of NUMA node {', '.join(map(str, missing))}, beside which GPUs are"
    return ""


def stripes(arena_bytes: int, nodes: Sequence[int], slot_bytes: int) -> tuple[Region, ...]:
    """Part an arena into stripes, so that wherever a bucket lies each node has as much of it as its GPUs are to pull.

    A stripe is about what one GPU pulls of a bucket: with smaller ones copies are many, with larger ones the parts of
    the nodes are uneven.

    Args:
        arena_bytes: to be covered.
        nodes: by GPU, the NUMA node that it hangs on; at least one.
        slot_bytes: what a bucket has at most.

    Returns:
        Regions that cover the arena in ascending order.
    """
    nbytes = STRIPE_BYTES
    while 2 * nbytes <= slot_bytes // len(nodes) or arena_bytes > nbytes * MOST_STRIPES:
        nbytes *= 2
    starts = range(0, arena_bytes, nbytes)
    order = islice(cycle(_turns(nodes)), len(starts))
    return tuple(
        Region(start, min(nbytes, arena_bytes - start), node) for start, node in zip(starts, order, strict=True)
    )


def _turns(nodes: Sequence[int]) -> list[int]:
    """One round of the order: every node as often as GPUs hang on it, by the smallest numbers, evenly spread."""
    counts = {node: nodes.count(node) for node in sorted(set(nodes))}
    shared = gcd(*counts.values())
    weights = {node: count // shared for node, count in counts.items()}
    total = sum(weights.values())
    due = dict.fromkeys(weights, 0)
    turns: list[int] = []
    for _ in range(total):
        for node, weight in weights.items():
            due[node] += weight
        turn = max(due, key=due.__getitem__)
        due[turn] -= total
        turns.append(turn)
    return turns

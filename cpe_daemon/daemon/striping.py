"""Stripes of the arena over the NUMA nodes of GPUs: whether there are any, and what became of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import structlog

from cpe_daemon.arena import Arena
from cpe_daemon.core.stripes import stripes, why_not
from cpe_daemon.devices.device import Device
from cpe_daemon.devices.numa import memory_nodes
from cpe_daemon.errors import ResourceError

log = structlog.get_logger(__name__)


def place(setting: Literal["auto", "off"], arena: Arena, device: Device) -> None:
    """Stripe an arena that has no pages yet, or say why not. Blocking."""
    topology = device.topology
    nodes = [gpu.numa_node for gpu in topology.gpus]
    if setting == "off":
        arena.unplaced = "arena.numa is off"
    elif device.kind == "shm":
        arena.unplaced = "no GPU pulls from it"
    elif not topology.peer_access:
        arena.unplaced = "every GPU pulls all of it"
    else:
        arena.unplaced = why_not(nodes, memory_nodes())
    if arena.unplaced:
        log.info("arena.not_striped", reason=arena.unplaced)
        return
    try:
        arena.place(stripes(arena.nbytes, [node for node in nodes if node is not None], device.slot_bytes))
    except ResourceError as error:
        arena.unplaced = error.message
        log.warning(
            "arena.not_striped",
            reason=error.message,
            mend="in a container, allow mbind(2) (CAP_SYS_NICE, or a seccomp profile that has it), for GPUs to pull"
            " from memory near to them; or set arena.numa to off",
        )


def settle(arena: Arena, device: Device) -> None:
    """Once the arena has its pages, have pushes go by where they lie. Blocking."""
    if not arena.regions:
        return
    strayed_bytes = arena.settle()
    device.topology = replace(device.topology, regions=arena.regions)
    say = log.warning if strayed_bytes else log.info
    say(
        "arena.striped",
        nodes=sorted(arena.node_bytes),
        stripe_bytes=arena.regions[0].nbytes,
        strayed_bytes=strayed_bytes,
    )

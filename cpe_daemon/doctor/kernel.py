"""Checks of what the kernel gives every process: shared memory that can be sealed, cores, file descriptors."""

from __future__ import annotations

import re
from typing import Final

from cpe_daemon.doctor.finding import Judgement, fail, gib, ok, skip, warn, worst
from cpe_daemon.doctor.gpus import Gpu, gpus, numbers
from cpe_daemon.doctor.host import Host
from cpe_daemon.doctor.subject import Subject, cores, cores_text, field
from cpe_daemon.doctor.systemd import SERVICE, unit, unit_bytes

_NODES: Final = "/sys/devices/system/node"
_SEALS: Final = (5, 1)
"""`F_SEAL_FUTURE_WRITE`, by which workers cannot write to slots."""

_POPULATE: Final = (5, 14)
"""`MADV_POPULATE_WRITE`, by which the arena's pages are there before the first version is."""

_OWN_FILES: Final = 256
"""The daemon's own sockets and threads, and the workers of a node full of engines."""

_FILES_A_TRAINER: Final = 4
"""Its connection, its tether, and its landing ring, which is offered under a second number at first."""


def judge_kernel(subject: Subject) -> Judgement:
    """Whether shared memory can be made, sealed and prefaulted."""
    release = (subject.host.read("/proc/sys/kernel/osrelease") or "").strip()
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        return skip("/proc/sys/kernel/osrelease cannot be read")
    version = (int(found[1]), int(found[2]))
    if version < _SEALS:
        return fail(
            f"Linux {release} has no F_SEAL_FUTURE_WRITE, which keeps an engine from spoiling slots",
            "run Linux 5.1 or newer; 5.14 also prefaults",
        )
    if (subject.host.read("/proc/sys/vm/memfd_noexec") or "").strip() == "2":
        return fail("vm.memfd_noexec is 2: the kernel refuses the daemon's memfd", "sysctl vm.memfd_noexec=1")
    if version < _POPULATE:
        return warn(
            f"Linux {release} has no MADV_POPULATE_WRITE: pages of the arena come with the first version, slowly",
            "run Linux 5.14 or newer, or publish a version before it matters",
        )
    return ok(f"Linux {release} seals shared memory and prefaults it")


def judge_files(subject: Subject) -> Judgement:
    """Whether there are file descriptors for as many trainers as may connect."""
    if subject.needs is None:
        return skip("the settings are not valid: see config")
    place, whose = subject.process()
    try:
        limit = subject.limit("Max open files")
    except LookupError as error:
        return skip(str(error))
    service = unit(subject.host) if place == "/proc/self" else {}
    if service.get("LoadState") == "loaded" and "LimitNOFILE" in service:
        limit, whose = unit_bytes(service["LimitNOFILE"]), SERVICE
    wanted = _OWN_FILES + _FILES_A_TRAINER * subject.needs.max_trainers
    if limit is None or limit >= wanted:
        return ok(f"{whose} may open {'any number' if limit is None else limit} files; {wanted} are enough")
    mend = f"set LimitNOFILE={max(65536, wanted)} in the unit, or `ulimit -n {max(65536, wanted)}`"
    if limit <= _OWN_FILES:
        return fail(f"{whose} may open {limit} files, too few for a node of engines", mend)
    trainers = (limit - _OWN_FILES) // _FILES_A_TRAINER
    return warn(
        f"{whose} may open {limit} files, which is enough for about {trainers} trainer ranks on this host"
        f" of the {subject.needs.max_trainers} that ingest.max_trainers allows",
        f"{mend}; or lower ingest.max_trainers",
    )


def judge_numa(subject: Subject) -> Judgement:
    """Whether the process may use the cores and the memory beside each GPU."""
    host = subject.host
    nodes = _nodes(host)
    if not nodes:
        return skip("the kernel names no NUMA nodes")
    _, whose = subject.process()
    allowed = cores(subject.process_status("Cpus_allowed_list"))
    memories = cores(subject.process_status("Mems_allowed_list"))
    shapes = ", ".join(
        f"node {node}: cores {cores_text(here)}, {gib(_bytes(host, node))}" for node, here in nodes.items()
    )
    found = gpus(host).found
    if len(nodes) == 1:
        return ok(f"one NUMA node, beside everything ({shapes})")
    if not found:
        return ok(f"{len(nodes)} NUMA nodes and no GPU ({shapes})")
    if not allowed:
        return skip("the kernel does not say on which cores this may run")
    beside = {gpu: _node(host, gpu) for gpu in found}
    far = _far(beside, nodes, allowed, memories, whose)
    places = "; ".join(
        f"{numbers([gpu for gpu in found if beside[gpu] == node])} at node {node}"
        for node in sorted(set(beside.values()))
    )
    return worst(far, f"{whose} may run beside every GPU: {places} ({shapes})")


def _far(
    beside: dict[Gpu, int], nodes: dict[int, set[int]], allowed: set[int], memories: set[int], whose: str
) -> list[Judgement]:
    """What keeps the process from where its GPUs are."""
    judged: list[Judgement] = []
    for node in sorted(set(beside.values())):
        here = [gpu for gpu, at in beside.items() if at == node]
        if node not in nodes:
            judged.append(
                warn(
                    f"nobody says beside which NUMA node {numbers(here)} is",
                    "look for NUMA or SRAT in the firmware's settings; a virtual machine needs the topology passed on",
                )
            )
        elif not allowed & nodes[node]:
            judged.append(
                warn(
                    f"{whose} may not run on the cores beside {numbers(here)} ({cores_text(nodes[node])}): copies cross"
                    " the sockets",
                    f"allow them: CPUAffinity={cores_text(allowed | nodes[node])} in the unit, or a container's cpuset",
                )
            )
        elif memories and node not in memories:
            judged.append(
                warn(
                    f"{whose} may not have memory of node {node}, beside {numbers(here)}",
                    "allow it: AllowedMemoryNodes= in the unit, or a container's cpuset.mems",
                )
            )
    return judged


def _nodes(host: Host) -> dict[int, set[int]]:
    """The cores of each NUMA node that has some."""
    names = [name for name in host.names(_NODES) or [] if re.fullmatch(r"node\d+", name)]
    nodes = {int(name.removeprefix("node")): cores(host.read(f"{_NODES}/{name}/cpulist") or "") for name in names}
    return {node: here for node, here in sorted(nodes.items()) if here}


def _bytes(host: Host, node: int) -> int:
    """How much memory a node has. Its lines read "Node 0 MemTotal:  24684084 kB"."""
    words = field(host.read(f"{_NODES}/node{node}/meminfo") or "", f"Node {node} MemTotal").split()
    return int(words[0]) * 1024 if words else 0


def _node(host: Host, gpu: Gpu) -> int:
    """Beside which node a GPU is; -1 where the firmware does not say."""
    text = (host.read(f"{gpu.sysfs}/numa_node") or "-1").strip()
    return int(text) if text.isdigit() else -1

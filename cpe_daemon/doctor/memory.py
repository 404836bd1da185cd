"""Checks of memory: is there enough for the arena, may it be locked, and in which pages does it come?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from cpe_daemon.doctor.finding import GIB, Judgement, fail, gib, ok, skip, warn
from cpe_daemon.doctor.host import Host
from cpe_daemon.doctor.subject import Needs, Subject, field
from cpe_daemon.doctor.systemd import SERVICE, unit, unit_bytes

_GROUPS: Final = PurePosixPath("/sys/fs/cgroup")
_HUGE: Final = "/sys/kernel/mm/transparent_hugepage"
_CAP_IPC_LOCK: Final = 14
_TIGHT: Final = 0.9
"""Of what can be had: beyond this, the landing rings of trainers and the engines compete for what is left."""

_LARGE_BYTES: Final = 64 * GIB
"""From here on 4 KiB pages are millions, and the start takes noticeably longer for them."""

NO_SETTINGS: Final = "the settings are not valid: see config"


def judge_memory(subject: Subject) -> Judgement:
    """Whether the host, its control groups and its overcommit rule have room for the arena."""
    if subject.shut_out:
        return skip("nobody knows whether a daemon has its arena: see daemon")
    held = subject.arena_bytes() or 0 if subject.status() else 0  # a daemon answers once every page of it is there
    if held and (subject.needs is None or subject.needs.arena_bytes <= held):
        return ok(f"the daemon has its arena of {gib(held)}")
    if (owner := subject.silent()) is not None:
        return skip(f"process {owner} has taken its arena, or is taking it: see daemon")
    if subject.needs is None:
        return skip(NO_SETTINGS)
    meminfo = subject.host.read("/proc/meminfo")
    if meminfo is None:
        return skip("/proc/meminfo cannot be read")
    return _room(subject.needs, held, meminfo, list(_limits(subject.host)), subject.host)


def _room(needs: Needs, held: int, meminfo: str, groups: list[tuple[int, str]], host: Host) -> Judgement:
    """Compare what is needed with the tightest of all bounds; ``held`` is what the daemon that runs would give back."""
    bounds = [(_kib(meminfo, "MemAvailable"), "MemAvailable"), *groups]
    if (host.read("/proc/sys/vm/overcommit_memory") or "").strip() == "2":
        left = _kib(meminfo, "CommitLimit") - _kib(meminfo, "Committed_AS")
        bounds.append((max(0, left), "the commit limit (vm.overcommit_memory is 2)"))
    free, bound = min(bounds)
    free += held
    parts = f"the arena of {gib(needs.arena_bytes)}"
    if needs.slot_bytes:
        parts += f" and slots of {gib(needs.slot_bytes)}"
    found = f"{parts} need {gib(needs.memory_bytes)}, and {bound} leaves {gib(free)}"
    if held:
        found += f", with the arena of {gib(held)} that the daemon which runs would give back"
    if needs.memory_bytes > free:
        return fail(found, f"lower arena.size_bytes, or raise {_what_to_raise(bound)}")
    if needs.memory_bytes > _TIGHT * free:
        ring = f" ({gib(needs.ring_bytes)} for each trainer rank of this host)" if needs.ring_bytes else ""
        return warn(
            f"{found}: little is left for landing rings{ring} and for the engines",
            f"lower arena.size_bytes, or raise {_what_to_raise(bound)}",
        )
    return ok(f"{found}; /dev/shm and its size do not matter: the arena is a memfd")


def _what_to_raise(bound: str) -> str:
    if bound == "MemAvailable":
        return "what the host has free: end what holds memory, or give back reserved huge pages (vm.nr_hugepages)"
    if bound.startswith("the commit"):
        return "the commit limit (vm.overcommit_memory=0, or a higher vm.overcommit_ratio)"
    return f"{bound} (a container's memory limit, or MemoryMax= of the unit)"


def _limits(host: Host) -> Iterator[tuple[int, str]]:
    """Of each control group around this process, of both versions: what it can still give, and its file."""
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            for group in _up(_GROUPS, path):
                yield from _left(host, group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for group in _up(_GROUPS / "memory", path):
                yield from _left(host, group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _up(root: PurePosixPath, path: str) -> list[PurePosixPath]:
    """A group and all around it, up to the root of the file system of groups."""
    group = root / path.strip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]


def _left(host: Host, group: PurePosixPath, limit: str, usage: str, reclaimable: str) -> Iterator[tuple[int, str]]:
    most = (host.read(f"{group}/{limit}") or "").strip()
    used = (host.read(f"{group}/{usage}") or "").strip()
    if most.isdigit() and used.isdigit() and int(most) < 1 << 62:  # version 1 writes "no limit" as a huge number
        given_back = re.search(rf"^{reclaimable} (\d+)$", host.read(f"{group}/memory.stat") or "", re.MULTILINE)
        yield max(0, int(most) - int(used) + int(given_back[1] if given_back else 0)), f"{group}/{limit}"


def _kib(meminfo: str, name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    words = field(meminfo, name).split()
    return int(words[0]) * 1024 if words else 0


def judge_memlock(subject: Subject) -> Judgement:
    """Whether the arena may be locked, which RDMA always needs and a GPU's driver may."""
    needed, host = subject.arena_bytes(), subject.host
    if needed is None:
        return skip(NO_SETTINGS)
    place, whose = subject.process()
    try:
        limit = subject.limit("Max locked memory")
    except LookupError as error:
        return skip(str(error))
    service = unit(host) if place == "/proc/self" else {}
    if service.get("LoadState") == "loaded" and "LimitMEMLOCK" in service:
        limit, whose = unit_bytes(service["LimitMEMLOCK"]), SERVICE
    elif _may_lock_anything(subject, place):
        return ok(f"{whose} may lock any amount (CAP_IPC_LOCK)")
    if limit is None or limit >= needed:
        return ok(f"{whose} may lock {'any amount' if limit is None else gib(limit)}; the arena has {gib(needed)}")
    found = f"{whose} may lock {gib(limit)}, less than the arena of {gib(needed)}"
    mend = "set LimitMEMLOCK=infinity in the unit, `--ulimit memlock=-1` for a container, or `ulimit -l unlimited`"
    rdma, gpus = host.names("/sys/class/infiniband"), host.names("/proc/driver/nvidia/gpus")
    if rdma:
        return fail(f"{found}: it cannot be registered with {', '.join(rdma)}", mend)
    if gpus or (subject.needs is not None and subject.needs.wants_gpu):
        return warn(f"{found}: pinning it for the GPUs may be refused", mend)
    return ok(f"{found}; nothing here locks memory, for there is neither a GPU nor an RDMA device")


def _may_lock_anything(subject: Subject, place: str) -> bool:
    """Whether the process is privileged: in the first user namespace, for the kernel asks for no other's capability."""
    effective = subject.process_status("CapEff")
    namespace = (subject.host.read(f"{place}/uid_map") or "0 0 4294967295").split()
    has = bool(re.fullmatch(r"[0-9a-f]+", effective)) and bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)
    return has and namespace == ["0", "0", "4294967295"]


def judge_hugepages(subject: Subject) -> Judgement:
    """Whether the arena can come in huge pages, and whether pages are reserved that it cannot use."""
    host = subject.host
    meminfo = host.read("/proc/meminfo") or ""
    words = field(meminfo, "HugePages_Free").split()
    reserved = int(words[0]) * _kib(meminfo, "Hugepagesize") if words else 0
    total = _kib(meminfo, "MemTotal")
    if reserved > total / 10:
        return warn(
            f"{gib(reserved)} of {gib(total)} are reserved as huge pages, which the arena does not use",
            "lower vm.nr_hugepages, unless something else on this host needs them",
        )
    setting = _shared(host)
    if not setting:
        return skip("the kernel has no transparent huge pages for shared memory")
    found = f"transparent huge pages for shared memory, which the arena is: {setting}"
    if setting in {"always", "within_size", "force"}:
        return ok(found)
    arena = subject.arena_bytes()
    if arena is None:
        return skip(NO_SETTINGS)
    if arena < _LARGE_BYTES:
        return ok(f"{found}; an arena of {gib(arena)} does without")
    return warn(
        f"{found}: an arena of {gib(arena)} comes in {arena // 4096:,} pages of 4 KiB, which makes the start slower",
        f"`echo within_size > {_HUGE}/shmem_enabled`, before the daemon starts",
    )


def _shared(host: Host) -> str:
    """The kernel's rule for huge pages of shared memory; newer ones have one a size, which may refer to that of all."""
    for path in (f"{_HUGE}/hugepages-2048kB/shmem_enabled", f"{_HUGE}/shmem_enabled"):
        found = re.search(r"\[(\w+)\]", host.read(path) or "")
        if found is not None and found[1] != "inherit":
            return found[1]
    return ""

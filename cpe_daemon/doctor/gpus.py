"""Checks of the GPUs themselves, and the facts about them that other checks use.

They come from nvidia-smi, whose drivers agree on these fields over many releases, so that nothing of CUDA is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cpe_daemon.doctor.finding import Judgement, fail, listed, ok, skip, warn
from cpe_daemon.doctor.host import Host
from cpe_daemon.doctor.subject import Subject

SMI_SECONDS: Final = 20.0
"""Without persistence mode the driver first wakes every GPU, which takes seconds each."""

_FIELDS: Final = "index,uuid,name,pci.bus_id,driver_version,compute_mode,mig.mode.current"
QUERY: Final = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")

_NVIDIA: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"
_BUS: Final = "/sys/bus/pci/devices"

_MENDS: Final = (
    (
        "Driver/library version mismatch",
        "the driver was upgraded under the running kernel: reboot, or reload its modules",
    ),
    ("couldn't communicate with the NVIDIA driver", "load or install the driver (`modprobe nvidia`, `dkms status`)"),
    ("Insufficient Permissions", "let this user open /dev/nvidia*"),
    ("Unknown Error", "in a container, give it the GPUs again: its right to /dev/nvidia* was lost (systemd reload)"),
    ("is lost", "the GPU fell off the bus: drain the host and reboot it; look for Xid in `dmesg`"),
    ("is not a valid field to query", "the driver is older than what it is asked: install 525 or newer"),
    ("requires reset", "drain the host and reset the GPU (`nvidia-smi --gpu-reset -i N`), or reboot"),
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver describes it; ``address`` is its name in /sys/bus/pci/devices."""

    index: int
    uuid: str
    name: str
    address: str
    driver: str
    compute_mode: str
    mig: str

    @property
    def sysfs(self) -> str:
        """Its directory in sysfs."""
        return f"{_BUS}/{self.address}"


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that the driver shows to this process.

    Args:
        found: all of them; empty if it shows none or does not answer.
        problem: why it does not.
    """

    found: tuple[Gpu, ...] = ()
    problem: str = ""


def gpus(host: Host) -> Gpus:
    """Ask the driver."""
    ran = host.run(QUERY, SMI_SECONDS)
    if ran is None:
        return Gpus()
    if ran.status is None:
        return Gpus(problem=f"nvidia-smi did not answer within {SMI_SECONDS:g} s")
    if ran.status != 0:
        return Gpus() if "No devices were found" in ran.out + ran.err else Gpus(problem=ran.said)
    return Gpus(tuple(gpu for line in ran.out.splitlines() if (gpu := _parsed(line)) is not None))


def _parsed(line: str) -> Gpu | None:
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(_FIELDS.split(",")) or not words[0].isdigit():
        return None
    index, uuid, name, bus, *rest = words
    domain, _, place = bus.partition(":")
    address = f"{int(domain, 16):04x}:{place}".lower() if domain else bus
    return Gpu(int(index), uuid, name, address, *rest)


def without_gpus(host: Host) -> Judgement | None:
    """Return why a check of GPUs is skipped; None if there are some."""
    seen = gpus(host)
    if seen.found:
        return None
    return skip("the GPUs' driver does not answer: see gpus" if seen.problem else "there is no NVIDIA GPU")


def numbers(found: list[Gpu]) -> str:
    """Name GPUs: "GPU 3", "GPUs 0, 2"."""
    return f"GPU{'s' if len(found) > 1 else ''} {listed([gpu.index for gpu in found])}"


def judge_gpus(subject: Subject) -> Judgement:
    """Whether the driver answers, and what it shows."""
    seen, host = gpus(subject.host), subject.host
    wanted = subject.needs is not None and subject.needs.wants_gpu
    if seen.problem:
        mend = next((mend for sign, mend in _MENDS if sign in seen.problem), "look for Xid and NVRM in `dmesg`")
        return fail(seen.problem, mend)
    broken = [gpu for gpu in seen.found if any(mark in gpu.name + gpu.uuid for mark in ("[", "Error"))]
    if broken:
        return fail(
            f"{numbers(broken)} does not answer its driver: {broken[0].name}", "reboot; look for Xid in `dmesg`"
        )
    if seen.found:
        return _shown(list(seen.found), subject.variable("CUDA_VISIBLE_DEVICES"))
    on_bus = _on_bus(host)
    if on_bus:
        return warn(
            f"GPUs are on the PCI bus ({listed(on_bus)}), and no driver shows them",
            "install the NVIDIA driver with nvidia-smi; give a container its GPUs (`--gpus all`)",
        )
    if wanted:
        return fail(
            "the settings ask for GPUs (device.kind), and there is none", "set device.kind to shm, or run elsewhere"
        )
    return skip("there is no NVIDIA GPU: engines on the CPU take weights from shared memory")


def _shown(found: list[Gpu], visible: str) -> Judgement:
    """Name the GPUs, and say if CUDA would show fewer of them."""
    names = [gpu.name for gpu in found]
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    text = f"{kinds}, driver {found[0].driver}: {listed([gpu.uuid for gpu in found])}"
    if visible and len(visible.split(",")) < len(found):
        return warn(f"{text}; CUDA_VISIBLE_DEVICES={visible} hides some of them", "run the daemon without it")
    return ok(text)


def _on_bus(host: Host) -> list[str]:
    """Name the PCI functions that are NVIDIA's GPUs."""
    return [
        name
        for name in host.names(_BUS) or []
        if (host.read(f"{_BUS}/{name}/vendor") or "").strip() == _NVIDIA
        and (host.read(f"{_BUS}/{name}/class") or "").startswith(_DISPLAY_CLASS)
    ]


def judge_compute_mode(subject: Subject) -> Judgement:
    """Whether two processes, the daemon and an engine, may use a GPU at once."""
    if (none := without_gpus(subject.host)) is not None:
        return none
    seen = gpus(subject.host).found
    others = [gpu for gpu in seen if gpu.compute_mode not in {"Default", "[N/A]", "[Not Supported]"}]
    if not others:
        return ok("Default on every GPU: the daemon and the engines may share them")
    modes = ", ".join(dict.fromkeys(gpu.compute_mode for gpu in others))
    return fail(
        f"{numbers(others)}: {modes}, so the daemon and an engine cannot both use it",
        "; ".join(f"`nvidia-smi -i {gpu.index} -c DEFAULT`" for gpu in others[:8]),
    )


def judge_mig(subject: Subject) -> Judgement:
    """Whether GPUs are cut into instances, between which memory is not shared."""
    if (none := without_gpus(subject.host)) is not None:
        return none
    cut = [gpu for gpu in gpus(subject.host).found if gpu.mig == "Enabled"]
    if not cut:
        return ok("off on every GPU")
    return fail(
        f"{numbers(cut)}: MIG is on, and the instances of a GPU can neither be named by its UUID nor copy to others",
        "; ".join(f"`nvidia-smi -i {gpu.index} -mig 0`" for gpu in cut[:8]) + ", once nothing uses them",
    )

"""Checks of what lies between GPUs and the host, and between one GPU and another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cpe_daemon.doctor.finding import Judgement, listed, ok, skip, warn, worst
from cpe_daemon.doctor.gpus import SMI_SECONDS, Gpu, gpus, without_gpus
from cpe_daemon.doctor.host import Host
from cpe_daemon.doctor.subject import Subject

LINK_QUERY: Final = (
    "nvidia-smi",
    "--query-gpu=index,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max",
    "--format=csv,noheader,nounits",
)
PEERS: Final = ("nvidia-smi", "topo", "-p2p", "r")
TOPOLOGY: Final = ("nvidia-smi", "topo", "-m")

_WIDTHS: Final = frozenset({1, 2, 4, 8, 12, 16})
_GENERATIONS: Final = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")

_REASONS: Final = {
    "CNS": (
        "the chipset does not support it",
        "look for ACS and the IOMMU in the firmware's settings: both send copies between GPUs through the host",
    ),
    "GNS": ("the GPU does not support it", "nothing mends that on this kind of GPU"),
    "TNS": ("they are too far apart on the PCI bus", "put the GPUs of one engine below one socket"),
    "NS": (
        "the driver does not support it now",
        "with NVSwitch, start nvidia-fabricmanager in the driver's own version; else look for NVRM in `dmesg`",
    ),
    "DR": ("a setting of the driver disables it", "look for RegistryDwords in /etc/modprobe.d"),
    "U": ("the driver does not know", "look for NVRM in `dmesg`"),
}


@dataclass(frozen=True, slots=True)
class Link:
    """One GPU's way to the host; 0 where nobody knows.

    Args:
        width: lanes in use.
        most: lanes that the card has.
        slot: lanes that the port above it has.
        generation: the best that card and port can do together; less is in use while the GPU is idle.
        card_generation: the best that the card can do.
    """

    width: int
    most: int
    slot: int
    generation: int
    card_generation: int


def judge_pcie(subject: Subject) -> Judgement:
    """Whether each GPU has all its lanes, and the generation that it was built for."""
    host = subject.host
    if (none := without_gpus(host)) is not None:
        return none
    links = {gpu: _link(host, gpu) for gpu in gpus(host).found}
    known = [link for link in links.values() if link.width]
    if not known:
        return skip("neither nvidia-smi nor sysfs tells the width of the links")
    kinds = dict.fromkeys(f"x{link.width}" + (f" Gen{link.generation}" if link.generation else "") for link in known)
    well = f"{len(known)} of {len(links)} links known, with all their lanes: {', '.join(kinds)}"
    if len(known) == len(links):
        well = f"every GPU has all its lanes: {', '.join(kinds)} (idle ones may run at a lower generation)"
    return worst([one for gpu, link in links.items() if (one := _shortfall(gpu, link)) is not None], well)


def _shortfall(gpu: Gpu, link: Link) -> Judgement | None:
    """What a link lacks; None if nothing."""
    whose = f"GPU {gpu.index} ({gpu.address})"
    if 0 < link.width < link.most:
        share = f"{link.most // link.width} times slower than it could"
        found = f"{whose} runs on {link.width} of its {link.most} lanes: weights reach it {share}"
        if 0 < link.slot <= link.width:
            return warn(found, f"its slot has {link.slot} lanes: put it into an x{link.most} slot")
        return warn(found, "reseat the card and its riser; look for bifurcation of the slot in the firmware's settings")
    if 0 < link.generation < link.card_generation:
        return warn(
            f"{whose} could do PCIe Gen{link.card_generation}, and its slot allows Gen{link.generation}",
            "look for the slot's link speed in the firmware's settings; an older mainboard has no more to give",
        )
    return None


def _link(host: Host, gpu: Gpu) -> Link:
    """Join what nvidia-smi and sysfs know. What NVML calls the maximum is that of card and slot together."""
    told = _told(host).get(gpu.index, [0, 0, 0])
    width = told[1] or _lanes(host, f"{gpu.sysfs}/current_link_width")
    return Link(
        width=width,
        most=max(told[2], _lanes(host, f"{gpu.sysfs}/max_link_width")),
        slot=_lanes(host, f"{gpu.sysfs}/../max_link_width"),
        generation=told[0],
        card_generation=_generation(host, f"{gpu.sysfs}/max_link_speed"),
    )


def _told(host: Host) -> dict[int, list[int]]:
    """By GPU: the generation that is possible, lanes now, and lanes that are possible, as nvidia-smi says."""
    ran = host.run(LINK_QUERY, SMI_SECONDS)
    lines = ran.out.splitlines() if ran is not None and ran.status == 0 else []
    rows = [[word.strip() for word in line.split(",")] for line in lines]
    return {
        int(row[0]): [int(word) if word.isdigit() else 0 for word in row[1:]]
        for row in rows
        if len(row) == 4 and row[0].isdigit()
    }


def _lanes(host: Host, path: str) -> int:
    """A width of sysfs; 0 for what no link has, as virtual machines may say."""
    text = (host.read(path) or "").strip()
    return int(text) if text.isdigit() and int(text) in _WIDTHS else 0


def _generation(host: Host, path: str) -> int:
    """A speed of sysfs, "32.0 GT/s PCIe", as a generation; 0 if it is none."""
    return _GENERATIONS.get((host.read(path) or "").partition(" ")[0], 0)


def judge_peer_access(subject: Subject) -> Judgement:
    """Whether GPUs copy to one another directly, and over what."""
    host = subject.host
    if (none := without_gpus(host)) is not None:
        return none
    if len(gpus(host).found) == 1:
        return skip("there is one GPU, which has nobody to copy to")
    ran = host.run(PEERS, SMI_SECONDS)
    pairs = _matrix(ran.out) if ran is not None and ran.status == 0 else {}
    if not pairs:
        return skip(f"`{' '.join(PEERS)}` does not say: {ran.said if ran is not None else 'there is no such program'}")
    refused = {pair: code for pair, code in pairs.items() if code != "OK"}
    if not refused:
        return ok(f"every GPU can copy to every other, over {_links(host)}")
    return worst([_refused(code, refused) for code in dict.fromkeys(refused.values())], "")


def _refused(code: str, refused: dict[tuple[int, int], str]) -> Judgement:
    """What one of nvidia-smi's codes means, and for whom."""
    reason, mend = _REASONS.get(code, (f"nvidia-smi says {code}", "`nvidia-smi topo -p2p r` explains its codes"))
    pairs = [f"{source}→{target}" for (source, target), other in refused.items() if other == code]
    return warn(
        f"GPUs {listed(pairs)} cannot copy to one another ({reason}): each fetches every byte over its own PCIe link",
        mend,
    )


def _links(host: Host) -> str:
    """Over what GPUs are connected: "NVLink (NV18)", "PCIe (PIX, SYS)"."""
    ran = host.run(TOPOLOGY, SMI_SECONDS)
    codes = sorted(set(_matrix(ran.out).values())) if ran is not None and ran.status == 0 else []
    fast = [code for code in codes if code.startswith("NV")]
    slow = [code for code in codes if code not in fast]
    ways = [f"{name} ({', '.join(some)})" for name, some in (("NVLink", fast), ("PCIe", slow)) if some]
    return " and ".join(ways) or "links that nvidia-smi does not name"


def _matrix(text: str) -> dict[tuple[int, int], str]:
    """Read a matrix of `nvidia-smi topo` between GPUs; columns of other devices come after theirs and are left out."""
    pairs: dict[tuple[int, int], str] = {}
    columns = 0
    for line in _COLOURS.sub("", text).splitlines():
        words = line.split()
        here = [word for word in words if re.fullmatch(r"GPU\d+", word)]
        if len(here) > 1:
            columns = len(here)  # the heading
        elif len(here) == 1 and words[0] == here[0]:
            row = int(here[0].removeprefix("GPU"))
            pairs |= {(row, column): code for column, code in enumerate(words[1 : columns + 1]) if column != row}
    return pairs

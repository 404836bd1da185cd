"""`cpe doctor` on recorded hosts: GPUs and the links between them, in nvidia-smi's words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cpe_daemon.doctor.gpus import QUERY
from cpe_daemon.doctor.host import Ran
from cpe_daemon.doctor.interconnect import LINK_QUERY, PEERS, TOPOLOGY
from tests.unit.doctor_hosts import (
    DISPLAY,
    H200_ADDRESSES,
    NEEDS,
    PCI,
    RecordedHost,
    container,
    examined,
    h200,
    is_,
    laptop,
    link_row,
    peer_matrix,
    smi_row,
    topology,
    with_daemon,
)

WANTS_GPU = dataclasses.replace(NEEDS, wants_gpu=True)


def smi(ran: Ran | None) -> RecordedHost:
    return h200().but(commands={QUERY: ran})


def rows(*, but: dict[int, dict[str, str]]) -> RecordedHost:
    """The eight GPUs, of which some say something else."""
    return smi(Ran(0, "".join(smi_row(index, bus, **but.get(index, {})) for index, bus in enumerate(H200_ADDRESSES))))


def failing(text: str, status: int = 9, *, at: str = "out") -> RecordedHost:
    return smi(Ran(status, **{at: f"{text}\n"}))


# --- gpus ------------------------------------------------------------------------------------------------------------


def test_gpus_are_named_with_their_driver() -> None:
    is_(examined("gpus", h200()), "ok", "8 × NVIDIA H200, driver 570.124.06", "GPU-00000003-5a1f")


def test_gpus_that_an_environment_hides_are_warned_of() -> None:
    is_(examined("gpus", h200().but(environ={"CUDA_VISIBLE_DEVICES": "0,1"})), "warn", "=0,1 hides", "without it")
    is_(examined("gpus", h200().but(environ={"CUDA_VISIBLE_DEVICES": "7,6,5,4,3,2,1,0"})), "ok")
    running = with_daemon(h200()).but(environ={"CUDA_VISIBLE_DEVICES": "0"})
    is_(examined("gpus", running), "ok")
    is_(
        examined("gpus", running.but(files={"/proc/4242/environ": "A=1\0CUDA_VISIBLE_DEVICES=3\0"})), "warn", "=3 hides"
    )


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.",
            "modprobe nvidia",
        ),
        ("Failed to initialize NVML: Driver/library version mismatch", "reboot"),
        ("Failed to initialize NVML: Unknown Error", "in a container"),
        ("Failed to initialize NVML: Insufficient Permissions", "/dev/nvidia*"),
        ("Unable to determine the device handle for GPU0000:1B:00.0: GPU is lost. Reboot the system to recover", "Xid"),
        ('Field "mig.mode.current" is not a valid field to query.', "525 or newer"),
        ("something that nobody has seen before", "NVRM"),
    ],
)
def test_gpus_fail_with_what_the_driver_says(text: str, mend: str) -> None:
    is_(examined("gpus", failing(text)), "fail", text, mend)


def test_gpus_fail_if_nvidia_smi_hangs() -> None:
    is_(examined("gpus", smi(Ran(None))), "fail", "did not answer within 20 s", "dmesg")


def test_gpus_fail_if_one_is_lost() -> None:
    is_(examined("gpus", rows(but={5: {"name": "[GPU requires reset]"}})), "fail", "GPU 5", "[GPU requires reset]")


def test_gpus_warn_of_cards_without_a_driver() -> None:
    host = laptop().but(files={f"{PCI}/0000:1b:00.0/{name}": value for name, value in DISPLAY.items()})
    is_(examined("gpus", host), "warn", "0000:1b:00.0", "--gpus all")


def test_gpus_that_a_container_was_not_given_are_not_there() -> None:
    is_(examined("gpus", smi(Ran(6, "No devices were found\n"))), "warn", "no driver shows them")


def test_gpus_fail_if_the_settings_want_one() -> None:
    is_(examined("gpus", laptop(), needs=WANTS_GPU), "fail", "device.kind")


def test_gpus_are_skipped_on_a_cpu_host() -> None:
    is_(examined("gpus", laptop()), "skip", "no NVIDIA GPU")


def test_lines_of_nvidia_smi_that_are_no_gpu_are_passed_over() -> None:
    host = smi(Ran(0, "Warning: infoROM is corrupted at gpu 0000:1B:00.0\n" + smi_row(0, "1b")))
    is_(examined("gpus", host), "ok", "1 × NVIDIA H200")


@pytest.mark.parametrize("name", ["pcie", "peer-access", "compute-mode", "mig"])
def test_checks_of_gpus_are_skipped_without_one(name: str) -> None:
    is_(examined(name, laptop()), "skip", "no NVIDIA GPU")
    is_(examined(name, smi(Ran(None))), "skip", "see gpus")


# --- compute mode and MIG --------------------------------------------------------------------------------------------


def test_compute_mode_has_to_be_default() -> None:
    is_(examined("compute-mode", h200()), "ok", "Default")
    is_(examined("compute-mode", rows(but={1: {"mode": "[N/A]"}})), "ok")
    alone = rows(but={2: {"mode": "Exclusive_Process"}, 6: {"mode": "Prohibited"}})
    is_(
        examined("compute-mode", alone),
        "fail",
        "GPUs 2, 6: Exclusive_Process, Prohibited",
        "nvidia-smi -i 2 -c DEFAULT",
    )


def test_mig_has_to_be_off() -> None:
    is_(examined("mig", h200()), "ok")
    is_(examined("mig", rows(but={0: {"mig": "[N/A]"}})), "ok")
    is_(examined("mig", rows(but={4: {"mig": "Enabled"}})), "fail", "GPU 4", "nvidia-smi -i 4 -mig 0")


# --- PCIe ------------------------------------------------------------------------------------------------------------


def links(*, but: dict[int, dict[str, int]], files: dict[str, str | None] | None = None) -> RecordedHost:
    told = "".join(link_row(index, **but.get(index, {})) for index in range(8))
    return h200().but(commands={LINK_QUERY: Ran(0, told)}, files=files or {})


def sysfs(index: int, **facts: str | None) -> dict[str, str | None]:
    here = f"{PCI}/0000:{H200_ADDRESSES[index]}:00.0"
    return {f"{here}/{name.replace('port_', '../')}": fact for name, fact in facts.items()}


def test_pcie_is_well_with_all_lanes() -> None:
    is_(examined("pcie", h200()), "ok", "every GPU has all its lanes: x16 Gen5")
    is_(examined("pcie", container()), "ok", "x16 Gen5")


def test_pcie_warns_of_half_the_lanes() -> None:
    finding = examined("pcie", links(but={3: {"width": 8}}))
    is_(finding, "warn", "GPU 3 (0000:61:00.0) runs on 8 of its 16 lanes", "2 times slower", "reseat the card")


def test_pcie_warns_of_a_slot_that_nvml_takes_for_the_maximum() -> None:
    # An x16 card in an x8 slot: NVML calls 8 lanes the maximum, of card and slot together.
    host = links(but={3: {"width": 8, "most": 8}}, files=sysfs(3, port_max_link_width="8\n"))
    is_(examined("pcie", host), "warn", "8 of its 16 lanes", "its slot has 8 lanes: put it into an x16 slot")


def test_pcie_warns_of_a_slot_of_an_older_generation() -> None:
    is_(examined("pcie", links(but={0: {"generation": 4}})), "warn", "could do PCIe Gen5", "Gen4", "firmware")


def test_pcie_names_every_gpu_that_falls_short() -> None:
    finding = examined("pcie", links(but={1: {"width": 4}, 2: {"width": 8}}))
    is_(finding, "warn", "GPU 1 (0000:43:00.0) runs on 4", "4 times slower", "GPU 2 (0000:52:00.0) runs on 8")
    assert finding.mend.count("reseat") == 1


def test_pcie_takes_sysfs_where_nvidia_smi_does_not_know() -> None:
    host = h200().but(commands={LINK_QUERY: Ran(2, 'Field "pcie.link.gen.max" is not a valid field to query.\n')})
    is_(examined("pcie", host), "ok", "all its lanes: x16")
    is_(examined("pcie", host.but(files=sysfs(5, current_link_width="4\n"))), "warn", "GPU 5", "4 of its 16")


def test_pcie_does_not_believe_widths_that_no_link_has() -> None:
    # As virtual machines may pass them on.
    host = h200().but(
        commands={LINK_QUERY: Ran(0, "0, [N/A], [N/A], [N/A]\n"), QUERY: Ran(0, smi_row(0, "1b"))},
        files=sysfs(0, current_link_width="0\n", max_link_width="63\n", max_link_speed="Unknown\n"),
    )
    is_(examined("pcie", host), "skip", "neither nvidia-smi nor sysfs")


def test_pcie_says_of_how_many_links_it_knows() -> None:
    host = links(but={}, files=sysfs(7, current_link_width=None))
    told = "".join(link_row(index) for index in range(7))
    is_(examined("pcie", host.but(commands={LINK_QUERY: Ran(0, told)})), "ok", "7 of 8 links known")


# --- peer access -----------------------------------------------------------------------------------------------------


def peers(text: str, code: str = "NV18", **terms: Any) -> RecordedHost:
    return h200().but(commands={PEERS: Ran(0, text), TOPOLOGY: Ran(0, topology(8, code))}, **terms)


def test_peer_access_over_nvlink() -> None:
    is_(examined("peer-access", h200()), "ok", "over NVLink (NV18)")


def test_peer_access_over_pcie() -> None:
    is_(examined("peer-access", peers(peer_matrix(8), "PIX")), "ok", "over PCIe (PIX)")
    is_(examined("peer-access", h200().but(commands={TOPOLOGY: None})), "ok", "does not name")


@pytest.mark.parametrize(
    ("code", "reason", "mend"),
    [
        ("CNS", "chipset", "ACS"),
        ("GNS", "GPU does not support", "nothing mends"),
        ("TNS", "too far apart", "one socket"),
        ("NS", "driver does not support", "nvidia-fabricmanager"),
        ("DR", "setting of the driver", "/etc/modprobe.d"),
        ("U", "does not know", "NVRM"),
        ("XYZ", "says XYZ", "explains its codes"),
    ],
)
def test_peer_access_that_is_refused_says_why(code: str, reason: str, mend: str) -> None:
    host = peers(peer_matrix(8, but={(0, 5): code, (5, 0): code}))
    is_(examined("peer-access", host), "warn", "GPUs 0→5, 5→0 cannot copy", reason, mend)


def test_peer_access_refused_everywhere_is_not_listed_at_length() -> None:
    is_(examined("peer-access", peers(peer_matrix(8, "CNS"))), "warn", "0→7, 1→0 and 48 more")


def test_peer_access_of_one_gpu_is_skipped() -> None:
    is_(examined("peer-access", smi(Ran(0, smi_row(0, "1b")))), "skip", "one GPU")


@pytest.mark.parametrize("ran", [None, Ran(255, "", "Failed to run topology matrix: Unknown Error\n"), Ran(0, "")])
def test_peer_access_that_nobody_tells_is_skipped(ran: Ran | None) -> None:
    is_(examined("peer-access", h200().but(commands={PEERS: ran})), "skip", "does not say")

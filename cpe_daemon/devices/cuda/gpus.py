"""Which GPUs this host has, which NUMA node each hangs on, and whether peer copies help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cpe_daemon.core.plan import Gpu
from cpe_daemon.devices.cuda.driver import Driver
from cpe_daemon.errors import ConfigError, ResourceError

_PCI: Final = Path("/sys/bus/pci/devices")
_UUID: Final = re.compile("GPU-[0-9a-f-]{0,36}")


@dataclass(frozen=True, slots=True)
class Found:
    """A GPU of this host: the driver's number for it in this process, and what stays the same in every process."""

    device: int
    gpu: Gpu
    name: str
    total_bytes: int


def find(driver: Driver, wanted: Sequence[str] = ()) -> list[Found]:
    """Return the GPUs that this process may use, in the driver's order.

    Args:
        driver: of this host.
        wanted: UUIDs of those to take, in full or from their beginning on; empty: all.

    Raises:
        ConfigError: no GPU could ever have a name that is wanted.
        ResourceError: one that is wanted is not here now, or there is none at all.
    """
    if misnamed := [name for name in wanted if not _UUID.fullmatch(name)]:
        raise ConfigError(
            f"device.uuids names {', '.join(misnamed)}, which is not how a GPU's UUID begins: GPU-, then hexadecimal"
            " digits, as `nvidia-smi -L` prints it"
        )
    here = [
        Found(
            device,
            Gpu(driver.uuid(device), numa_node(driver.pci_bus_id(device))),
            driver.name(device),
            driver.total_bytes(device),
        )
        for device in driver.devices()
    ]
    if not here:
        raise ResourceError(
            "the driver shows no GPU to this process; see CUDA_VISIBLE_DEVICES and the container's devices"
        )
    missing = [name for name in wanted if not any(found.gpu.uuid.startswith(name) for found in here)]
    if missing:
        shown = ", ".join(found.gpu.uuid for found in here)
        raise ResourceError(
            f"device.uuids names {', '.join(missing)}, and the driver shows {shown}; see nvidia-smi whether that GPU"
            " has failed, and correct device.uuids if it was never here"
        )
    return [found for found in here if not wanted or any(found.gpu.uuid.startswith(name) for name in wanted)]


def numa_node(pci_bus_id: str, root: Path = _PCI) -> int | None:
    """The NUMA node that a PCI device hangs on; None if the host has one node or does not say."""
    try:
        node = int((root / pci_bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def exchanges(driver: Driver, found: Sequence[Found]) -> bool:
    """Whether GPUs should complete each other's slots: all are joined by NVLink.

    Over PCIe alone a peer copy takes the very links that bring the weights from the host.
    """
    return all(
        driver.can_access(one.device, other.device) and driver.linked(one.device, other.device)
        for one in found
        for other in found
        if one is not other
    )

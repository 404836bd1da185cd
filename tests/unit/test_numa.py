"""Placing memory on NUMA nodes: the kernel's calls on this host, and what the daemon makes of them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cpe_daemon.arena import Arena
from cpe_daemon.config import effective, load_config, load_with_origins
from cpe_daemon.core.topology import Gpu, Region, Topology
from cpe_daemon.daemon import striping
from cpe_daemon.devices import numa
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.status import arena_status
from tests.unit.fake_node import StillDevice

MIB = 1 << 20
STRIPE = 2 * MIB


@pytest.fixture(autouse=True)
def nothing_kept(no_leaks: None) -> None:
    """Every test here gives back what it takes."""


@pytest.fixture
def node() -> int:
    """A node of this host, if its kernel lets us choose."""
    nodes = numa.memory_nodes()
    memory = SharedMemory.create("cpe-test", mmap.PAGESIZE)
    try:
        first = min(nodes, default=0)
        numa.prefer(memory.address, memory.nbytes, first)
        numa.node_of(memory.address)
    except ResourceError as error:
        pytest.skip(f"this host lets nobody place memory: {error}")
    finally:
        memory.close()
    return first


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(8 * STRIPE)
    yield made
    made.close()


def policies(name: str) -> list[str]:
    """By mapping of a region, what the kernel says of its policy."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return [line.split()[1] for line in lines if f"memfd:{name}" in line]


# --- the kernel --------------------------------------------------------------------------------------------------


def test_preferred_range_has_its_policy_and_its_pages_on_the_node(node: int) -> None:
    memory = SharedMemory.create("cpe-test", 4 * STRIPE)
    numa.prefer(memory.address + STRIPE, STRIPE, node)
    assert policies("cpe-test") == ["default", f"prefer:{node}", "default"]
    memory.prefault(0, memory.nbytes)
    assert numa.node_of(memory.address + STRIPE) == node
    numa.forget(memory.address, memory.nbytes)
    assert policies("cpe-test") == ["default"]
    assert numa.node_of(memory.address + STRIPE) == node
    memory.close()


def test_node_that_is_not_there_is_refused(node: int) -> None:
    memory = SharedMemory.create("cpe-test", STRIPE)
    with pytest.raises(ResourceError, match="mbind is refused: Invalid argument"):
        numa.prefer(memory.address, STRIPE, 1000)
    memory.close()


def test_memory_without_pages_has_no_node_to_tell(node: int) -> None:
    with pytest.raises(ResourceError, match="get_mempolicy is refused"):
        numa.node_of(1 << 46)


def test_another_machine_is_refused_rather_than_another_call_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(ResourceError, match="s390x"):
        numa.prefer(0, STRIPE, 0)


@pytest.mark.parametrize(("listed", "nodes"), [("0", {0}), ("0-1", {0, 1}), ("0,2-3,7", {0, 2, 3, 7}), (None, set())])
def test_nodes_whose_memory_may_be_had_are_as_the_kernel_lists_them(
    listed: str | None, nodes: set[int], tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tcpe\n" if listed is None else f"Mems_allowed:\t3\nMems_allowed_list:\t{listed}\n")
    assert numa.memory_nodes(status) == nodes
    assert numa.memory_nodes(tmp_path / "none") == set()


# --- the arena ---------------------------------------------------------------------------------------------------


def regions_of(arena: Arena, nodes: Sequence[int]) -> list[Region]:
    return [Region(at * STRIPE, STRIPE, nodes[at % len(nodes)]) for at in range(arena.nbytes // STRIPE)]


async def test_arena_is_one_mapping_again_once_its_pages_are_there(arena: Arena, node: int) -> None:
    """What is page-locked is what it always was: one mapping."""
    placed = [region for region in regions_of(arena, [node]) if region.offset // STRIPE % 2]
    arena.place(placed)
    assert len(policies("cpe-arena")) == len(regions_of(arena, [node]))
    await arena.prefault(2)
    assert arena.settle() == 0
    assert arena.regions == tuple(placed)
    assert arena.node_bytes == {node: 4 * STRIPE}
    assert policies("cpe-arena") == ["default"]


async def test_policy_stays_where_pages_come_at_first_touch(
    arena: Arena, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena._memory, "prefault", lambda offset, nbytes: False)
    arena.place(regions_of(arena, [node]))
    await arena.prefault(1)
    arena.settle()
    assert policies("cpe-arena") == [f"prefer:{node}"]


def test_arena_that_may_not_be_placed_is_left_as_it_was(arena: Arena, node: int) -> None:
    with pytest.raises(ResourceError, match="refused"):
        arena.place(regions_of(arena, [node, 1000]))
    assert arena.regions == ()
    assert policies("cpe-arena") == ["default"]


def test_regions_say_where_pages_lie_and_not_where_they_should(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "prefer", lambda address, nbytes, node: None)
    monkeypatch.setattr(numa, "node_of", lambda address: 0)
    monkeypatch.setattr(numa, "forget", lambda address, nbytes: None)
    arena.place(regions_of(arena, [0, 1]))
    assert arena.node_bytes == {0: 4 * STRIPE, 1: 4 * STRIPE}
    assert arena.settle() == 4 * STRIPE
    assert arena.node_bytes == {0: 8 * STRIPE}


def test_what_cannot_be_asked_is_believed(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise ResourceError("get_mempolicy is refused: Operation not permitted")

    monkeypatch.setattr(numa, "prefer", lambda address, nbytes, node: None)
    monkeypatch.setattr(numa, "node_of", refuse)
    arena.place(regions_of(arena, [0, 1]))
    assert arena.settle() == 0
    assert arena.node_bytes == {0: 4 * STRIPE, 1: 4 * STRIPE}


# --- the daemon --------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StillDevice:
    """Two GPUs at two nodes, of whose memory this process may have both."""
    made = StillDevice(2)
    made.kind = "cuda"
    made.slot_bytes = 2 * STRIPE
    made.topology = Topology((Gpu("GPU-0", 0), Gpu("GPU-1", 1)), peer_access=True)
    monkeypatch.setattr(striping, "memory_nodes", lambda: {0, 1})
    monkeypatch.setattr(numa, "prefer", lambda address, nbytes, node: None)
    monkeypatch.setattr(numa, "forget", lambda address, nbytes: None)
    return made


def test_pushes_go_by_where_the_arena_lies(arena: Arena, device: StillDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(address: int) -> int:
        return (address - arena.address) // STRIPE % 2

    monkeypatch.setattr(numa, "node_of", found)
    with capture_logs() as logs:
        striping.place("auto", arena, device)
        assert not device.topology.has_near_memory
        striping.settle(arena, device)
    assert device.topology.regions == tuple(regions_of(arena, [0, 1]))
    assert arena_status(arena)["numa"] == {"node_bytes": {"0": 4 * STRIPE, "1": 4 * STRIPE}, "reason": ""}
    assert [(line["event"], line["log_level"], line["nodes"]) for line in logs] == [("arena.striped", "info", [0, 1])]


def test_memory_that_came_from_elsewhere_is_warned_of(
    arena: Arena, device: StillDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "node_of", lambda address: 0)
    striping.place("auto", arena, device)
    with capture_logs() as logs:
        striping.settle(arena, device)
    assert [(line["log_level"], line["strayed_bytes"]) for line in logs] == [("warning", 4 * STRIPE)]


def test_kernel_that_refuses_leaves_everything_as_it_was(
    arena: Arena, device: StillDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: int, nbytes: int, node: int) -> None:
        raise ResourceError("mbind is refused: Operation not permitted")

    monkeypatch.setattr(numa, "prefer", refuse)
    before = device.topology
    with capture_logs() as logs:
        striping.place("auto", arena, device)
        striping.settle(arena, device)
    assert device.topology == before
    assert [(line["event"], line["log_level"]) for line in logs] == [("arena.not_striped", "warning")]
    assert "CAP_SYS_NICE" in logs[0]["mend"]
    assert "Operation not permitted" in arena_status(arena)["numa"]["reason"]


@pytest.mark.parametrize(
    ("setting", "change", "reason"),
    [
        ("off", {}, "arena.numa is off"),
        ("auto", {"kind": "shm"}, "no GPU pulls from it"),
        ("auto", {"peer_access": False}, "every GPU pulls all of it"),
        ("auto", {"gpus": (Gpu("GPU-0", 0), Gpu("GPU-1", 0))}, "the same NUMA node"),
        ("auto", {"gpus": (Gpu("GPU-0", 0), Gpu("GPU-1"))}, "does not say"),
        ("auto", {"gpus": (Gpu("GPU-0", 0), Gpu("GPU-1", 5))}, "no memory of NUMA node 5"),
    ],
)
def test_arena_that_is_not_to_be_striped_says_why_in_a_line(
    setting: str, change: dict[str, object], reason: str, arena: Arena, device: StillDevice
) -> None:
    device.kind = str(change.pop("kind", device.kind))
    device.topology = before = replace(device.topology, **change)  # type: ignore[arg-type]
    with capture_logs() as logs:
        striping.place("off" if setting == "off" else "auto", arena, device)
        striping.settle(arena, device)
    assert [(line["event"], line["log_level"]) for line in logs] == [("arena.not_striped", "info")]
    assert reason in logs[0]["reason"]
    assert arena_status(arena)["numa"] == {"node_bytes": {}, "reason": logs[0]["reason"]}
    assert device.topology == before


@pytest.mark.parametrize("text", ["off", "'off'", "false"])
def test_setting_is_off_however_yaml_reads_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text(f"arena: {{numa: {text}}}\n")
    assert load_config(path, environ={}).arena.numa == "off"
    path.write_text(effective(load_with_origins(path, environ={})))
    assert load_config(path, environ={}).arena.numa == "off"
    assert load_config(environ={}).arena.numa == "auto"
    with pytest.raises(ConfigError, match=r"arena\.numa: must be one of auto, off"):
        load_config(environ={"CPE_ARENA__NUMA": "on"})

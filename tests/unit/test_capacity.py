"""Memory that is not there is refused before it is taken: of the host, and of every control group around."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpe_daemon.arena import Arena
from cpe_daemon.devices import capacity
from cpe_daemon.errors import ResourceError

MIB = 1 << 20


def limit(group: Path, limit: str, current: int, inactive: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file 2\n")


def test_host_gives_no_more_than_it_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < capacity.available_bytes() < int(total.split()[1]) * 1024


def test_group_gives_its_limit_less_what_it_cannot_give_back(tmp_path: Path) -> None:
    limit(tmp_path, str(100 * MIB), 60 * MIB, inactive=10 * MIB)
    assert list(capacity._left_in(tmp_path)) == [50 * MIB]
    limit(tmp_path, str(100 * MIB), 160 * MIB)
    assert list(capacity._left_in(tmp_path)) == [0]


def test_group_without_a_limit_is_passed_over(tmp_path: Path) -> None:
    assert list(capacity._left_in(tmp_path)) == []
    limit(tmp_path, "max", 60 * MIB)
    assert list(capacity._left_in(tmp_path)) == []


def test_tightest_group_around_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    mine = next((line for line in groups if line.startswith("0::")), None)
    if mine is None:
        pytest.skip("needs control groups of version 2")
    monkeypatch.setattr(capacity, "_GROUPS", tmp_path)
    limit(tmp_path / mine[3:].strip("/"), "max", 0)
    limit(tmp_path, str(3 * MIB), MIB)
    assert capacity.available_bytes() == 2 * MIB


def test_too_much_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda: 1 << 30)
    capacity.require_bytes(1 << 30, "the arena")
    with pytest.raises(ResourceError, match=r"the arena needs 1\.50 GiB of memory, and this host can give 1\.00 GiB"):
        capacity.require_bytes(3 << 29, "the arena")


async def test_arena_larger_than_the_host_takes_nothing() -> None:
    arena = Arena(1 << 46)
    try:
        with pytest.raises(ResourceError, match=r"the arena \(arena\.size_bytes\) needs 65536\.00 GiB"):
            await arena.prefault(2)
        assert arena.prefaulted_bytes == 0
    finally:
        arena.close()

"""Runs of chunks that threads fill at once: all chunks, each once, and hardly any that waits for another run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard
from cpe_daemon.publisher.runs import cut_runs


@given(st.lists(st.integers(0, 9000), max_size=30), st.integers(1, 3000), st.integers(1, 40))
def test_runs_hold_every_chunk_once_and_begin_where_a_shard_does(sizes: list[int], chunk: int, most: int) -> None:
    placed = layout(Shard(str(at), "uint8", (size,)) for at, size in enumerate(sizes))
    runs = cut_runs(placed, chunk, most)
    assert [index for run in runs for index in run] == list(range(-(-placed.nbytes // chunk)))
    assert len(runs) <= most
    assert all(runs)
    begins = {offset // chunk for offset, size in zip(placed.offsets, placed.sizes, strict=True) if size}
    assert all(run.start in begins for run in runs)


def test_shard_that_takes_more_makes_a_longer_run() -> None:
    placed = layout(Shard(str(at), "uint8", (size,)) for at, size in enumerate([1024] * 4 + [8192] + [1024] * 4))
    assert cut_runs(placed, 1024, 8) == [range(2), range(2, 4), range(4, 12), range(12, 14), range(14, 16)]

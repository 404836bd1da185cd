"""Which chunks follow one another in one thread. Pure."""

from __future__ import annotations

from cpe_daemon.core.manifest import Layout


def cut_runs(layout: Layout, chunk_bytes: int, most: int) -> list[range]:
    """Cut a contribution's chunks into runs, at ``most`` so many and of about one length.

    A shard is digested in its order, so a run begins with a chunk that another shard begins in: of what it fills, only
    the end of the shard before may have to wait for the run before. A shard that takes more chunks makes a longer run.
    """
    count = -(-layout.nbytes // chunk_bytes)
    grain = -(-count // most)
    runs: list[range] = []
    first = 0
    for offset, nbytes in zip(layout.offsets, layout.sizes, strict=True):
        chunk = offset // chunk_bytes
        if nbytes and chunk >= first + grain:
            runs.append(range(first, chunk))
            first = chunk
    return [*runs, range(first, count)] if first < count else runs

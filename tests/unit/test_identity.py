"""The digest of a version: it tells contents apart that may be called by one name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cpe_daemon.core.identity import content_digest
from cpe_daemon.core.types import Shard

W, B = Shard("w", "float32", (4, 2)), Shard("b", "float32", (2,))
TOP, BOTTOM = Shard("w", "float32", (4, 2), (0, 0), (2, 2)), Shard("w", "float32", (4, 2), (2, 0), (2, 2))
ONE, TWO = bytes([1]) * 16, bytes([2]) * 16
CONTENT: tuple[Sequence[Sequence[Shard]], Sequence[Sequence[bytes]]] = [[W, B]], [[ONE, TWO]]


def test_digest_has_16_bytes_and_is_the_same_for_the_same() -> None:
    assert len(content_digest(*CONTENT)) == 16
    assert content_digest(*CONTENT) == content_digest(((W, B),), ((ONE, TWO),))


@pytest.mark.parametrize(
    ("shards", "digests"),
    [
        ([[W, B]], [[TWO, ONE]]),
        ([[W, B]], [[ONE, ONE]]),
        ([[B, W]], [[ONE, TWO]]),
        ([[W], [B]], [[ONE], [TWO]]),
        ([[W, Shard("c", "float32", (2,))]], [[ONE, TWO]]),
        ([[W, Shard("b", "int32", (2,))]], [[ONE, TWO]]),
        ([[W, Shard("b", "float32", (1, 2))]], [[ONE, TWO]]),
        ([[TOP, B]], [[ONE, TWO]]),
        ([[BOTTOM, B]], [[ONE, TWO]]),
        ([[W]], [[ONE]]),
        ([[]], [[]]),
    ],
    ids=["bytes", "one's bytes", "order", "ranks", "name", "dtype", "shape", "part", "other part", "fewer", "none"],
)
def test_other_contents_have_other_digests(
    shards: Sequence[Sequence[Shard]], digests: Sequence[Sequence[bytes]]
) -> None:
    assert content_digest(shards, digests) != content_digest(*CONTENT)

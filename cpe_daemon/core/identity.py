"""The digest of a version: two contents that may be called by one name have one, whoever sent them, and when."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from xxhash import xxh3_128

from cpe_daemon.core.types import Shard


def content_digest(shards: Sequence[Sequence[Shard]], digests: Sequence[Sequence[bytes]]) -> bytes:
    """Digest what a version consists of: 16 bytes.

    It covers how many ranks contributed, and of every shard, in order, its name, dtype, shape, place in its tensor and
    bytes. The same weights, cut otherwise, are another content: nobody can tell that they are the same without them.

    Args:
        shards: by rank.
        digests: by rank and shard, xxh3_128 of its bytes.
    """
    return xxh3_128(msgspec.msgpack.encode((shards, digests))).digest()


def may_be_same(digest: bytes, other: bytes) -> bool:
    """Whether two digests may be of one content; ``b""`` is one that nobody knows, and may be any."""
    return not digest or not other or digest == other

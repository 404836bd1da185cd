"""The fold: 64 bits of all bytes of a version, by which an engine worker knows that it was handed what was staged.

It is cheap where bytes are moved (one multiplication and two additions a word, in numpy and in torch alike), and its
terms may be added in any order, so that it does not matter in which pieces a tensor came or travels. All arithmetic is
modulo 2^64, all words are unsigned and little-endian:

* A tensor is its bytes, filled up with zeros to rows of 32 words. Row ``r`` has the sum ``s`` of ``word * WEIGHTS[c]``
  over its words ``c``, and the value ``mix(s + (seed(name) + r) * STEP)``.
* The fold of a version is the sum of the values of all rows of all its tensors.

`mix` can be undone and weights are odd, so that a change within one word always changes the fold. So does an exchange
of two words of one row that differ in any but their highest five bits, for no two weights are equal modulo 64. A change
that leaves the sum of every row as it was is not noticed: an even number of words of one row, say, that change in their
very highest bit and in nothing else. Any other is missed with a probability of about 2^-64. It is no digest: whoever
wants to can find other bytes with the same fold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from xxhash import xxh3_64_intdigest

from cpe_daemon.core.manifest import tensor_offset
from cpe_daemon.core.types import Shard

ROW_BYTES: Final = 256
"""What parts of tensors are aligned to, in the arena and in slots."""

ROW_WORDS: Final = ROW_BYTES // 8
STEP: Final = 0x9E3779B97F4A7C15
ROUNDS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Of `mix`: shifts, each with the factor that follows it."""

LAST_SHIFT: Final = 31
_MODULUS: Final = 1 << 64
MAX_FOLD: Final = _MODULUS - 1


def mix(value: int) -> int:
    """Scatter 64 bits, reversibly: splitmix64's last steps."""
    for shift, factor in ROUNDS:
        value = (value ^ value >> shift) * factor % _MODULUS
    return value ^ value >> LAST_SHIFT


def seed(name: str) -> int:
    """What a tensor's rows are counted from: xxh3_64 of its name in UTF-8."""
    return xxh3_64_intdigest(name.encode())


def key(name: str, row: int) -> int:
    """What is added to the sum of a tensor's row."""
    return (seed(name) + row) * STEP % _MODULUS


def own_bytes(shard: Shard) -> int:
    """How many of a shard's bytes, from its first on, are rows of its tensor, the last of them filled up or not.

    The others share a row with what another rank has of the tensor. None are its own if it begins within a row.

    Raises:
        ManifestError: the shard's bytes are not contiguous in the tensor.
    """
    if shard.start is None:
        return shard.nbytes
    at, nbytes = tensor_offset(shard), shard.nbytes
    if at % ROW_BYTES:
        return 0
    return nbytes if at + nbytes == shard.spec.nbytes else nbytes - nbytes % ROW_BYTES


def covers(shards: Iterable[Shard]) -> bool:
    """Whether every byte of what a rank brings is in a row of its own, and so in the fold of them.

    Raises:
        ManifestError: a shard's bytes are not contiguous in its tensor.
    """
    return all(own_bytes(shard) == shard.nbytes for shard in shards)


def modulo(value: int) -> int:
    """Any sum, as the 64 bits that it is here."""
    return value % _MODULUS


WEIGHTS: Final = tuple(mix(2 * column + 1) & ~63 | 2 * column + 1 for column in range(ROW_WORDS))
"""Of a row's words: 1, 3, 5 ... in the lowest six bits, and scattered bits above."""

"""Messages that no daemon may take: by chance, by damage, and by design."""

from __future__ import annotations

import pickle  # noqa: TID251 - what an attacker sends
import random
import zlib
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any, get_args

import msgspec

from cpe_daemon.errors import ProtocolError
from cpe_daemon.wire.codec import ENVELOPE_BYTES, MAGIC, Codec, encode
from cpe_daemon.wire.messages import Message
from tests.data.wire_v1.samples import SAMPLES

Frames = list[bytes]

FRAMES = [encode(message) for pair in SAMPLES.values() for message in pair]
_PICKLE = pickle.dumps({"type": "ping", "weights": [b"x" * 100]})
_HUGE = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
_FIELDS: dict[str, list[Any]] = {
    "protocol": [0, -1, 2, 1 << 63, "1", None, 1.5],
    "rank": [-1, 1 << 63, "0", None, [0]],
    "world_size": [0, -1, 1 << 63, {}, None],
    "stream": [-1, "x", None, 1.5, []],
    "round": ["x", None, {}],
    "model": [1, None, b"m", []],
    "version": [1, [], "m@r#1", {"model": "m"}, {"model": 1, "run": 1, "number": 1}],
    "shards": [1, {}, [1], [["w"]], [["w", "float32", "abc"]], [None]],
    "digests": ["text", 1, None, []],
    "nbytes": ["x", None, 1e300],
}


def enveloped(body: bytes) -> bytes:
    """A body under a checksum that is right: only its decoder can tell."""
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


class Garbage:
    """Endless multiparts that a router which takes ``accepts`` refuses as malformed, whoever sends them.

    Args:
        accepts: the union of the conversation.
        refused: says of a message that can be read whether it is refused all the same; others are left out.
        seed: of the random numbers.
    """

    def __init__(self, accepts: UnionType, refused: Callable[[Message], bool], seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._codec = Codec(accepts)
        self._refused = refused
        taken = {kind.__struct_config__.tag for kind in get_args(accepts)}
        self._others = [encode(m) for tag, pair in SAMPLES.items() if tag not in taken for m in pair]
        self._bodies = [frame[ENVELOPE_BYTES:] for frame in FRAMES]
        self._ways = [
            self._random,
            self._random_body,
            self._truncated,
            self._truncated_body,
            self._flipped,
            self._flipped_body,
            self._wrong_field,
            self._of_another_conversation,
            self._nested,
            self._endless,
            self._pickled,
            self._many_frames,
            self._empty,
        ]

    def __iter__(self) -> Iterator[Frames]:
        while True:
            frames = self._rng.choice(self._ways)()
            if self._is_refused(frames[0]):
                yield frames

    def _is_refused(self, header: bytes) -> bool:
        try:
            return self._refused(self._codec.decode(header))
        except ProtocolError:
            return True

    def _random(self) -> Frames:
        return [self._rng.randbytes(self._rng.randrange(200))]

    def _random_body(self) -> Frames:
        return [enveloped(self._rng.randbytes(self._rng.randrange(1, 60)))]

    def _truncated(self) -> Frames:
        frame = self._rng.choice(FRAMES)
        return [frame[: self._rng.randrange(len(frame))]]

    def _truncated_body(self) -> Frames:
        body = self._rng.choice(self._bodies)
        return [enveloped(body[: self._rng.randrange(1, len(body))])]

    def _flipped(self) -> Frames:
        return [self._flip(self._rng.choice(FRAMES))]

    def _flipped_body(self) -> Frames:
        body = self._rng.choice(self._bodies)
        for _ in range(self._rng.randrange(1, 4)):
            body = self._flip(body)
        return [enveloped(body), *[b"frame"] * self._rng.randrange(2)]

    def _wrong_field(self) -> Frames:
        fields = msgspec.msgpack.decode(self._rng.choice(self._bodies))
        wrong = self._rng.choice(sorted(_FIELDS))
        return [enveloped(msgspec.msgpack.encode({**fields, wrong: self._rng.choice(_FIELDS[wrong])}))]

    def _of_another_conversation(self) -> Frames:
        return [self._rng.choice(self._others)]

    def _nested(self) -> Frames:
        opening = self._rng.choice((b"\x91", b"\x81\xa1k"))
        return [enveloped(b"\x82\xa4type\xa4ping\xa3new" + opening * self._rng.choice((2_000, 20_000)) + b"\xc0")]

    def _endless(self) -> Frames:
        before = self._rng.choice((b"", b"\x81\xa4type", b"\x83\xa4type\xa4seal\xa6stream\x01\xa7digests"))
        return [enveloped(before + self._rng.choice(_HUGE))]

    def _pickled(self) -> Frames:
        return [self._rng.choice((_PICKLE, MAGIC + _PICKLE, enveloped(_PICKLE)))]

    def _many_frames(self) -> Frames:
        return [self._rng.choice(FRAMES)[:-1], *[b"x" * 20] * self._rng.choice((1, 10, 200))]

    def _empty(self) -> Frames:
        return self._rng.choice(([b""], [b"", b""], [b"", self._rng.choice(FRAMES)]))

    def _flip(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        damaged[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        return bytes(damaged)

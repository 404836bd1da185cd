"""Messages to frames and back; whatever is not a message becomes a `ProtocolError`, and nothing else.

A header frame is 4 bytes of magic, the CRC-32 of the body (little endian), and the body in msgpack. The checksum makes
every flipped or lost byte of a header an error by itself: without it a damaged number inside a well-formed message
would be believed. Bulk frames carry no checksum: their digests are in the manifest.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import UnionType
from typing import Any, Final, get_args

import msgspec

from cpe_daemon.errors import ProtocolError
from cpe_daemon.wire.messages import FrontMessage, Message, WorkerMessage

MAGIC: Final = b"cpe1"
ENVELOPE_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 16 << 20
"""Largest header: the digests of a rank's contribution of a million tensors."""

_COUNTED_BYTES: Final = 4096
"""Headers up to this size are looked through for fields that we do not know; larger ones are our own bulk lists."""

_TRAINERS_DOOR: Final = "the socket of trainers and operators (front.sock)"
_ENGINES_DOOR: Final = "the socket of engines (engines.sock)"

_encoder: Final = msgspec.msgpack.Encoder()
_fields: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
"""Looks at a message's field names without looking into the fields: what we do not know may hold anything."""


class _Tag(msgspec.Struct):
    """All that is read of a message which is not accepted."""

    type: str


_tag: Final = msgspec.msgpack.Decoder(_Tag)


def _tags(messages: UnionType | type[Message]) -> set[str]:
    """The tags of a conversation's messages."""
    kinds = get_args(messages) or (messages,)
    return {str(kind.__struct_config__.tag) for kind in kinds}


_DOORS: Final = {
    **dict.fromkeys(_tags(WorkerMessage), _ENGINES_DOOR),
    **dict.fromkeys(_tags(FrontMessage), _TRAINERS_DOOR),
}
"""Where each message that a client sends is taken; one that both doors take is never looked for."""


def encode(message: Message) -> bytes:
    """Return the header frame of ``message``."""
    body = _encoder.encode(message)
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


class Codec:
    """Decodes the header frames of one conversation. Not thread-safe: one a link.

    Args:
        messages: the union of message types that this side accepts.
    """

    def __init__(self, messages: UnionType | type[Message]) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(messages)
        self._tags = _tags(messages)
        self.unknown_fields = 0
        """Fields that peers sent and this release does not know; they were ignored."""

    def decode(self, header: bytes | memoryview) -> Message:
        """Return the message in a header frame.

        Raises:
            ProtocolError: it is none of the accepted messages, or is damaged.
        """
        body = self._open(memoryview(header))
        try:
            message: Message = self._decoder.decode(body)
            if len(body) <= _COUNTED_BYTES:
                self._count_unknown(body, message)
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise ProtocolError(self._misdirected(body) or f"not a message that is accepted here: {error}") from None
        return message

    def _misdirected(self, body: memoryview) -> str:
        """Where a message belongs that is none of this conversation's; "" if that is not what is wrong with it."""
        try:
            tag = _tag.decode(body).type
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
            return ""
        door = _DOORS.get(tag)
        return f"{tag} belongs to {door}, and this is another one" if door and tag not in self._tags else ""

    def _open(self, header: memoryview) -> memoryview:
        """Check the envelope and return the body."""
        if len(header) > MAX_HEADER_BYTES:
            raise ProtocolError(f"header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if len(header) <= ENVELOPE_BYTES or bytes(header[:4]) != MAGIC:
            raise ProtocolError(f"not a cpe message ({len(header)} bytes)")
        body = header[ENVELOPE_BYTES:]
        if zlib.crc32(body) != int.from_bytes(header[4:ENVELOPE_BYTES], "little"):
            raise ProtocolError(f"damaged message ({len(header)} bytes): its checksum differs")
        return body

    def _count_unknown(self, body: memoryview, message: Message) -> None:
        known = message.__struct_fields__
        self.unknown_fields += sum(1 for field in _fields.decode(body) if field != "type" and field not in known)


def check_bulk(frames: Sequence[memoryview], nbytes: int, most: int) -> None:
    """Check the bulk frames beside a message: 1 to ``most``, none of them empty, ``nbytes`` together.

    Raises:
        ProtocolError: they are not; says how large they are.
    """
    sizes = [frame.nbytes for frame in frames]
    if not 0 < len(sizes) <= most or sum(sizes) != nbytes or not all(sizes):
        raise ProtocolError(f"expected {nbytes} bytes in 1 to {most} frames beside the message, got {sizes}")

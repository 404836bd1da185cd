"""The codec: every message survives the way there and back, and whatever is not a message is a `ProtocolError`."""

from __future__ import annotations

import pickle  # noqa: TID251 - what an attacker sends
import random
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.errors import ProtocolError
from cpe_daemon.wire import messages as wire
from cpe_daemon.wire.codec import ENVELOPE_BYTES, MAGIC, MAX_HEADER_BYTES, Codec, check_bulk, encode
from cpe_daemon.wire.messages import (
    FrontMessage,
    FrontReply,
    Message,
    OpenVersion,
    Ping,
    WorkerCommand,
    WorkerMessage,
)
from tests.data.wire_v1.samples import SAMPLES

RECORDED = Path(__file__).parent.parent / "data" / "wire_v1"
CONVERSATIONS = (FrontMessage, FrontReply, WorkerMessage, WorkerCommand)
TYPES = sorted(Message.__subclasses__(), key=lambda kind: kind.__name__)
EVERYTHING: Any = Union[tuple(TYPES)]  # noqa: UP007 - a union of a list that is known at run time only

# --- values of every message type ------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(1 << 63), (1 << 64) - 1),
    str: st.text(max_size=40),
    bytes: st.binary(max_size=80),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    type(None): st.none(),
    Any: _JSON,
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation that messages use."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind)
        return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=4).map(tuple)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    raise NotImplementedError(f"messages have a field of type {kind}; teach the test to make one")


def enveloped(body: bytes) -> bytes:
    """A body with an envelope that is in order: what is wrong with it is for the decoder to find."""
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def pack(value: object) -> bytes:
    return enveloped(msgspec.msgpack.encode(value))


def refused(codec: Codec, header: bytes) -> bool:
    """Whether it is a `ProtocolError`; any other error goes through and fails the test."""
    try:
        codec.decode(header)
    except ProtocolError:
        return True
    return False


def sampled() -> Iterator[bytes]:
    for few, all_fields in SAMPLES.values():
        yield encode(few)
        yield encode(all_fields)


@pytest.fixture
def codec() -> Codec:
    return Codec(EVERYTHING)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_message_comes_back_as_it_was(kind: type[Message], codec: Codec) -> None:
    @given(message=values(kind))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def holds(message: Message) -> None:
        again = codec.decode(encode(message))
        assert type(again) is kind
        assert again == message

    holds()
    assert codec.unknown_fields == 0


def test_message_may_be_given_as_any_buffer(codec: Codec) -> None:
    frame = bytearray(encode(Ping()))
    assert codec.decode(bytes(frame)) == codec.decode(memoryview(frame)) == Ping()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 5e-324, 1.7976931348623157e308])
def test_odd_floats_come_back(value: float, codec: Codec) -> None:
    message = wire.Pause(1, value)
    assert codec.decode(encode(message)) == message


def test_every_message_type_has_its_own_tag() -> None:
    tags = [kind.__struct_config__.tag for kind in TYPES]
    assert len(set(tags)) == len(tags) == len(SAMPLES)
    assert all(kind.__struct_config__.tag_field == "type" for kind in TYPES)


def test_every_message_type_belongs_to_a_conversation() -> None:
    assert {kind for conversation in CONVERSATIONS for kind in get_args(conversation)} == set(TYPES)


# --- protocol N speaks to N-1 ----------------------------------------------------------------------------------------


def test_every_message_type_is_recorded() -> None:
    assert {path.stem for path in RECORDED.glob("*.hex")} == {kind.__struct_config__.tag for kind in TYPES}


@pytest.mark.parametrize("tag", SAMPLES)
def test_recorded_frame_says_what_it_said_then(tag: str, codec: Codec) -> None:
    frames = [bytes.fromhex(line) for line in (RECORDED / f"{tag}.hex").read_text().splitlines()]
    assert tuple(codec.decode(frame) for frame in frames) == SAMPLES[tag]
    assert codec.unknown_fields == 0


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_field_has_a_default_unless_protocol_1_sent_it_always(kind: type[Message]) -> None:
    """A later release may read frames of this one only if each field that these leave out has a default."""
    frame = bytes.fromhex((RECORDED / f"{kind.__struct_config__.tag}.hex").read_text().splitlines()[0])
    sent = set(msgspec.msgpack.decode(frame[ENVELOPE_BYTES:])) - {"type"}
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    assert required <= sent


@pytest.mark.parametrize("tag", SAMPLES)
def test_unknown_fields_are_ignored_and_counted(tag: str, codec: Codec) -> None:
    for message in SAMPLES[tag]:
        fields = msgspec.msgpack.decode(encode(message)[ENVELOPE_BYTES:])
        before = codec.unknown_fields
        assert codec.decode(pack({"new": [1, {"a": b"b"}], **fields, "newer": None})) == message
        assert codec.unknown_fields == before + 2


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xa1\xff", id="a string that is no UTF-8"),
        pytest.param(b"\xd4\xff\xff", id="a timestamp that is none"),
        pytest.param(b"\xd4\x05\x00", id="an extension"),
        pytest.param(b"\x81\x80\x01", id="a map whose key is a map"),
        pytest.param(b"\x81\x91\x01\x01", id="a map whose key is a list"),
        pytest.param(b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", id="not a number"),
    ],
)
def test_unknown_field_may_hold_what_this_release_cannot_read(content: bytes, codec: Codec) -> None:
    assert codec.decode(enveloped(b"\x82\xa4type\xa4ping\xa3new" + content)) == Ping()
    assert codec.unknown_fields == 1


def test_unknown_fields_of_nested_values_are_ignored(codec: Codec) -> None:
    version = {"model": "m", "run": "r", "number": 1, "epoch": 3}
    message = {"type": "open_version", "stream": 1, "version": version, "tensors": 0, "nbytes": 0}
    assert codec.decode(pack(message)) == OpenVersion(1, VersionId("m", "r", 1), 0, 0)


def test_element_added_to_a_shard_is_ignored(codec: Codec) -> None:
    shards = [["w", "float32", [2], None, None, "added later"]]
    message = codec.decode(pack({"type": "manifest_part", "stream": 1, "first": 0, "shards": shards}))
    assert isinstance(message, wire.ManifestPart)
    assert message.shards == [Shard("w", "float32", (2,))]


@pytest.mark.parametrize(
    "tag", ["", "Ping", "PING", "hello", "pickle", "ping ", "x" * 5000, 1, None, ["ping"], b"ping"]
)
def test_unknown_tag_is_refused(tag: object, codec: Codec) -> None:
    assert refused(codec, pack({"type": tag}))


def test_message_of_another_conversation_is_refused() -> None:
    for conversation in CONVERSATIONS:
        codec = Codec(conversation)
        for messages in SAMPLES.values():
            for message in messages:
                assert refused(codec, encode(message)) == (type(message) not in get_args(conversation))


# --- garbage ---------------------------------------------------------------------------------------------------------


@given(header=st.binary(max_size=300))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_bytes_are_refused(header: bytes) -> None:
    assert refused(Codec(EVERYTHING), header)


def test_random_bodies_in_order_outside_are_refused_or_messages(codec: Codec) -> None:
    """A body with a right checksum reaches msgpack; what comes out is a message or a `ProtocolError`."""
    rng = random.Random(20)
    for _ in range(20_000):
        refused(codec, enveloped(rng.randbytes(rng.randrange(1, 64))))


def test_every_truncation_is_refused(codec: Codec) -> None:
    for frame in sampled():
        for length in range(len(frame)):
            assert refused(codec, frame[:length])
            if length > ENVELOPE_BYTES:
                assert refused(codec, enveloped(frame[ENVELOPE_BYTES:length]))


def test_every_flipped_bit_is_refused(codec: Codec) -> None:
    for frame in sampled():
        for bit in range(len(frame) * 8):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            assert refused(codec, bytes(damaged))


def test_every_flipped_bit_under_a_right_checksum_is_refused_or_a_message(codec: Codec) -> None:
    """A sender that lies knows how to make a checksum: nothing but a message or a `ProtocolError` comes of it."""
    for frame in sampled():
        for bit in range(ENVELOPE_BYTES * 8, len(frame) * 8):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            refused(codec, enveloped(bytes(damaged[ENVELOPE_BYTES:])))


def test_trailing_bytes_are_refused(codec: Codec) -> None:
    for frame in sampled():
        assert refused(codec, frame + b"\0")
        assert refused(codec, enveloped(frame[ENVELOPE_BYTES:] + b"\0"))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        1.5,
        "ping",
        b"ping",
        [],
        ["ping"],
        {},
        {"type": "ping", 1: 2},
        [["type", "ping"]],
        {"Type": "ping"},
    ],
    ids=repr,
)
def test_what_is_no_map_with_a_tag_is_refused(value: object, codec: Codec) -> None:
    assert refused(codec, pack(value))


WRONG: list[object] = [None, True, -1.5, float("nan"), float("inf"), 1e300, "1", b"\1", [], [None], {}, {"a": 1}]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_field_of_a_wrong_type_is_refused(kind: type[Message], codec: Codec) -> None:
    """What a field takes is decided by building the message from it; nothing but `ProtocolError` says otherwise."""
    frame = encode(SAMPLES[str(kind.__struct_config__.tag)][1])
    fields = msgspec.msgpack.decode(frame[ENVELOPE_BYTES:])
    hints = get_type_hints(kind)
    for name in kind.__struct_fields__:
        for value in WRONG:
            takes = True
            try:
                msgspec.convert(value, hints[name], builtin_types=(bytes,))
            except msgspec.ValidationError:
                takes = False
            assert refused(codec, pack({**fields, name: value})) is not takes, (name, value)
        assert refused(codec, pack({key: value for key, value in fields.items() if key != name})) == any(
            field.required for field in msgspec.structs.fields(kind) if field.name == name
        )


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01", b"\xde\x00\x01\xa1k"], ids=bytes.hex)
@pytest.mark.parametrize("depth", [2_000, 1_000_000])
@pytest.mark.parametrize("before", [b"", b"\x82\xa4type\xa4ping\xa3new", b"\x82\xa4type\xacstatus_reply\xa6status"])
def test_deep_nesting_is_refused(opening: bytes, depth: int, before: bytes, codec: Codec) -> None:
    assert refused(codec, enveloped(before + opening * depth + b"\xc0"))


@pytest.mark.parametrize(
    "header",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["list", "map", "string", "bytes", "extension"],
)
@pytest.mark.parametrize(
    "before",
    [
        b"",
        b"\x81\xa4type",
        b"\x82\xa4type\xa4ping\xa3new",
        b"\x82\xa4type\xacstatus_reply\xa6status",
        b"\x84\xa4type\xadmanifest_part\xa6stream\x01\xa5first\x00\xa6shards",
        b"\x84\xa4type\xadmanifest_part\xa6stream\x01\xa5first\x00\xa6shards\x91\x93\xa1a\xa1b",
        b"\x83\xa4type\xa4seal\xa6stream\x01\xa7digests",
    ],
    ids=["alone", "tag", "unknown field", "any", "shards", "shape", "bytes"],
)
def test_huge_length_without_the_bytes_is_refused(before: bytes, header: bytes, codec: Codec) -> None:
    assert refused(codec, enveloped(before + header))


def test_integers_beyond_64_bits_are_refused(codec: Codec) -> None:
    for value in (b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7):
        message = codec.decode(enveloped(b"\x82\xa4type\xa6finish\xa5round" + value))
        assert isinstance(message, wire.Finish)
    assert refused(codec, enveloped(b"\x82\xa4type\xa6finish\xa5round\xcb\x43\xf0" + b"\x00" * 6))


class Harmful:
    """Unpickling it would raise, and say so."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_refused(protocol: int, codec: Codec) -> None:
    payload = pickle.dumps(Harmful(), protocol)
    for header in (payload, MAGIC + payload, enveloped(payload), pack(payload), pack({"type": payload})):
        assert refused(codec, header)


def test_largest_header_is_taken_and_a_larger_one_refused(codec: Codec) -> None:
    room = MAX_HEADER_BYTES - len(encode(wire.Seal(1, b"\0" * (1 << 20)))) + (1 << 20)
    largest = encode(wire.Seal(1, b"\0" * room))
    assert len(largest) == MAX_HEADER_BYTES
    assert not refused(codec, largest)
    with pytest.raises(ProtocolError, match="at most"):
        codec.decode(encode(wire.Seal(1, b"\0" * (room + 1))))


def test_error_names_what_is_wrong(codec: Codec) -> None:
    with pytest.raises(ProtocolError, match="checksum"):
        codec.decode(encode(Ping())[:-1] + b"!")
    with pytest.raises(ProtocolError, match="not a cpe message"):
        codec.decode(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ProtocolError, match=r"\$\.stream"):
        codec.decode(pack({"type": "seal", "stream": "one", "digests": b""}))


# --- the wrong door --------------------------------------------------------------------------------------------------


def test_message_at_the_wrong_socket_is_told_the_right_one() -> None:
    trainer, worker = SAMPLES["trainer_hello"][0], SAMPLES["worker_hello"][0]
    operator = SAMPLES["push_request"][0]
    for message in (trainer, operator):
        with pytest.raises(
            ProtocolError, match=r"belongs to the socket of trainers and operators \(front\.sock\), and"
        ):
            Codec(WorkerMessage).decode(encode(message))
    with pytest.raises(ProtocolError, match=r"worker_hello belongs to the socket of engines \(engines\.sock\), and"):
        Codec(FrontMessage).decode(encode(worker))


def test_bad_message_at_the_right_socket_is_told_what_is_wrong_with_it() -> None:
    body = msgspec.msgpack.encode({"type": "trainer_hello", "protocol": "one"})
    with pytest.raises(ProtocolError, match=r"not a message that is accepted here: .*protocol"):
        Codec(FrontMessage).decode(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)


# --- frames beside a message -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [[b"12345"], [b"1", b"2345"], [b"12", b"3", b"45"]])
def test_bulk_bytes_come_in_one_or_several_frames(frames: list[bytes]) -> None:
    check_bulk([memoryview(frame) for frame in frames], 5, 3)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"1234"],
        [b"123456"],
        [b"12345", b""],
        [b"", b"12345"],
        [b"123", b"", b"45"],
        [b"123", b"4"],
        [b"123", b"456"],
        [b"1", b"2", b"3", b"45"],
    ],
    ids=["none", "short", "long", "empty last", "empty first", "empty between", "short two", "long two", "four"],
)
def test_bulk_frames_that_are_none_too_many_empty_or_not_as_long_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="expected 5 bytes in 1 to 3 frames"):
        check_bulk([memoryview(frame) for frame in frames], 5, 3)

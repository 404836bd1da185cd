"""Frames of tensors: nobody gets any after the end, and it is known when the last one is gone."""

from __future__ import annotations

import threading

import pytest
import zmq

from cpe_daemon.publisher.in_place import SMALL_BYTES, InPlace
from cpe_daemon.publisher.straight import Straight

LARGE = SMALL_BYTES


def chunk(*sizes: int) -> InPlace:
    return InPlace([memoryview(bytearray(b"x" * size)) for size in sizes])


def test_chunk_is_sent_from_its_parts_until_it_is_taken_back() -> None:
    straight = Straight()
    first = chunk(LARGE, 3)
    straight.put(0, first)
    assert straight.at(0) is first
    for _ in range(2):  # one for each daemon
        frames = straight.frames(0)
        assert frames is not None
        assert [frame.bytes for frame in frames] == [b"x" * LARGE, b"xxx"]
    straight.take_back(0)
    assert straight.at(0) is None
    assert straight.frames(0) is None
    assert straight.frames(LARGE) is None


def test_nothing_is_sent_after_the_end() -> None:
    straight = Straight()
    straight.put(0, chunk(LARGE))
    straight.close()
    assert straight.frames(0) == []
    assert straight.frames(LARGE) is None
    assert straight.released(0.0)


@pytest.mark.parametrize("sent", [False, True])
def test_frames_are_released_when_they_were_received_or_dropped(sent: bool) -> None:
    straight = Straight()
    part = memoryview(bytearray(LARGE))
    straight.put(0, InPlace([part, memoryview(bytearray(3))]))
    frames = straight.frames(0)
    assert frames is not None
    straight.close()
    with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        pull.bind("inproc://frames")
        push.connect("inproc://frames")
        if sent:
            push.send_multipart(frames, copy=False)
            received = pull.recv_multipart(copy=False)
        frames.clear()
        if sent:
            assert not straight.released(0.01)
            received.clear()
        assert straight.released(20.0)


@pytest.mark.parametrize("round", range(30))
def test_frames_may_be_made_while_it_is_closed(round: int) -> None:
    straight = Straight()
    for at in range(20):
        straight.put(at, chunk(LARGE))
    made: list[list[zmq.Frame] | None] = []
    thread = threading.Thread(target=lambda: made.extend(straight.frames(at) for at in range(20)))
    thread.start()
    straight.close()
    thread.join(20.0)
    assert None not in made
    still = any(made)
    assert straight.released(0.0) is not still
    made.clear()
    assert straight.released(20.0)

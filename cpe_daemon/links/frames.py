"""Messages of several frames, without waiting. pyzmq's own calls for them cost up to three times as much."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import zmq

_LAST: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[bytes | memoryview | zmq.Frame]) -> None:
    """Send one message. The first frame decides whether there is room; it takes the others with it.

    Raises:
        zmq.Again: nothing was sent.
        zmq.ZMQError: nobody is there to send to.
    """
    for frame in frames[:-1]:
        socket.send(frame, _MORE)
    socket.send(frames[-1], _LAST)


def receive_frames(socket: zmq.Socket[bytes], most: int = sys.maxsize) -> list[zmq.Frame]:
    """Return the next ``most`` frames of the message that waits; what follows after them is still to be received.

    Raises:
        zmq.Again: none waits.
    """
    frames = [socket.recv(_LAST, copy=False)]
    while frames[-1].more and len(frames) < most:
        frames.append(socket.recv(_LAST, copy=False))
    return frames

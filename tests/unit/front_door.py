"""A daemon's front door for tests of commands: it answers as it is told to, and notes what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import zmq

from cpe_daemon.links.router import Router
from cpe_daemon.wire.messages import FrontMessage, Message

Answer = Callable[[Any], Message | None]
"""Called with a message; returns what to answer, or None to keep silent. It may raise a `CpeError` to refuse."""


@contextmanager
def front_door(endpoint: str, answers: Mapping[type[Message], Answer]) -> Iterator[list[Message]]:
    """Listen at an endpoint; the list grows by every message that comes."""
    ready, ending = threading.Event(), threading.Event()
    heard: list[Message] = []

    async def serve() -> None:
        with zmq.Context() as context:

            def take(peer: bytes, message: Message, _frames: Sequence[memoryview]) -> None:
                heard.append(message)
                answer = answers[type(message)](message)
                if answer is not None:
                    router.send(peer, answer)

            router = Router(
                "front",
                context,
                accepts=FrontMessage,
                handlers=dict.fromkeys(answers, take),
                max_frame_bytes=1 << 20,
            )
            router.bind(endpoint)
            router.start()
            ready.set()
            await asyncio.to_thread(ending.wait, 60)
            router.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield heard
    finally:
        ending.set()
        thread.join(10)

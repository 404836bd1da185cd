"""What a worker says of itself when it greets the daemon, and what it makes of an answer that is no welcome."""

from __future__ import annotations

from msgspec import structs

from cpe_daemon.errors import CpeError, PeerLostError, from_code
from cpe_daemon.wire.messages import ErrorReply, Farewell, Message, WorkerHello, WorkerState
from inference_plugins.loader import Loader


def renew(hello: WorkerHello, loader: Loader, digest: bytes) -> WorkerHello:
    """Fill in what the engine holds now.

    Args:
        hello: who the worker is.
        loader: the engine.
        digest: of the version that it holds; ``b""`` if that is not known.
    """
    held = structs.replace(hello, content=loader.content, touched=loader.touched, digest=digest)
    return structs.replace(held, asleep=loader.asleep, starting=loader.starting)


def refusal(message: Message | None, endpoint: str) -> CpeError | None:
    """Why the daemon at an endpoint does not take the worker in; None if the message does not say that."""
    if isinstance(message, ErrorReply):
        return from_code(message.error.code, message.error.message)
    if isinstance(message, Farewell):
        return PeerLostError(f"the daemon at {endpoint} takes no workers: {message.reason}")
    return None


def state_of(loader: Loader, digest: bytes) -> WorkerState:
    """What an attached worker says of its engine that went to sleep, or woke up; ``digest`` as in `renew`."""
    return WorkerState(loader.asleep, loader.content, loader.touched, digest)

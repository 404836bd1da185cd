"""What all messages have in common, and the protocol's number.

Compatibility: a daemon speaks `PROTOCOL` and the one before it. A field added later has a default; a field that a peer
does not know is ignored and counted; a message type that it does not know gets an `ErrorReply`. A field is never
renamed, retyped or reused.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cpe_daemon.wire.reports import ErrorInfo

PROTOCOL: Final = 1
OLDEST_PROTOCOL: Final = max(1, PROTOCOL - 1)
"""The protocols that this release speaks: its own and the one before."""


class Message(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Base of all messages. On the wire each carries its tag in the field ``type``."""


class ErrorReply(Message, frozen=True, tag="error"):
    """The peer's last message was refused. ``stream`` names the stream that it belonged to (0: none)."""

    error: ErrorInfo
    stream: int = 0


class Ping(Message, frozen=True, tag="ping"):
    """A client is alive; sent at the interval that the daemon's welcome gave."""


class Pong(Message, frozen=True, tag="pong"):
    """The daemon is alive. Another ``generation`` than before: it was restarted, and knows nothing of this client."""

    generation: str


class Farewell(Message, frozen=True, tag="farewell"):
    """The daemon stops, and this is the last that it says: what it has not finished by now it will not.

    Answered by a goodbye (`TrainerBye`, `WorkerBye`); a daemon that is about to stop answers every hello by it.
    """

    reason: str

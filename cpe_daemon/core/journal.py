"""The form of the journal: what a daemon writes down so that the next one on the node knows it. Pure.

A journal is believed for what it says of names: which numbers are used up, what was live, who was attached. What an
engine holds only the engine itself can say.
"""

from __future__ import annotations

from typing import Final

import msgspec
from xxhash import xxh3_128

from cpe_daemon.core.admission import History
from cpe_daemon.core.identity import may_be_same
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import ConfigError

FORMAT: Final = 1


class Identity(msgspec.Struct, frozen=True):
    """A version and the digest of what it consists of (`cpe_daemon.core.identity`); ``b""``: not known."""

    version: VersionId
    digest: bytes = b""

    def __str__(self) -> str:
        return str(self.version)

    def same_bytes(self, digest: bytes) -> bool:
        """Whether what has ``digest`` may be this, for all that is known."""
        return may_be_same(self.digest, digest)


class ModelEntry(msgspec.Struct, frozen=True):
    """What is known of a model: what its runs used up, and which versions the daemon had."""

    history: History = History()
    live: Identity | None = None
    retained: list[Identity] = []


class EngineEntry(msgspec.Struct, frozen=True):
    """An engine that was attached.

    ``held``: what it held whole; None if that was no version, or in doubt. ``gone_at``: Unix time since when no worker
    of it was attached; 0.0 if some were.
    """

    model: str = ""
    world_size: int = 1
    state: str = ""
    held: Identity | None = None
    gone_at: float = 0.0


class RoundEntry(msgspec.Struct, frozen=True):
    """A round that was decided on and not over: of ``version``, over the engines in ``held``, with what each held."""

    version: Identity
    held: dict[str, Identity | None] = {}


class State(msgspec.Struct, frozen=True):
    """All that a journal says.

    ``lost``: a journal before this one could not be read, so that there may have been versions that nobody knows of.
    """

    models: dict[str, ModelEntry] = {}
    engines: dict[str, EngineEntry] = {}
    round: RoundEntry | None = None
    lost: bool = False


class _Header(msgspec.Struct):
    """What files of all formats have."""

    format: int


class _File(msgspec.Struct):
    """A file of format 1. The checksum is of the state without white space, so that it may be laid out for people."""

    format: int
    checksum: str
    state: msgspec.Raw


def encode(state: State) -> bytes:
    """Write a state down: JSON, laid out for people, with a checksum."""
    body = msgspec.json.encode(state)
    file = msgspec.json.encode(_File(FORMAT, _checksum(body), msgspec.Raw(body)))
    return msgspec.json.format(file, indent=2) + b"\n"


def decode(content: bytes) -> State:
    """Read what `encode` wrote; fields that a later release added are left out.

    Raises:
        ConfigError: it is of another format, damaged, or was changed by hand; says which.
    """
    try:
        found = msgspec.json.decode(content, type=_Header).format
        if found != FORMAT:
            raise ConfigError(f"it has format {found}, and this release reads {FORMAT}")
        file = msgspec.json.decode(content, type=_File)
        body = msgspec.json.format(file.state, indent=-1)
        if _checksum(body) != file.checksum:
            raise ConfigError("its checksum does not match what it says")
        return msgspec.json.decode(body, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"it is damaged: {error}") from None


def _checksum(body: bytes) -> str:
    return xxh3_128(body).hexdigest()

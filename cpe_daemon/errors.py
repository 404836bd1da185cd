"""Every error that cpe-daemon raises on purpose, each with a stable ``code``.

The hierarchy separates who has to act:

* `CpeError`
    * `MisuseError`: the caller asked for something wrong; asking again unchanged fails again.
        * `ConfigError`: the configuration cannot be used; lists every problem at once.
        * `ManifestError`: a set of tensors is contradictory, incomplete or unsupported.
        * `VersionRefusedError`: the version's number or run may not be published now.
        * `LifecycleError`: an event that is illegal in the present state; nothing changed.
        * `AccessError`: a key is missing, is not allowed, or lacks the role for this.
    * `PeerError`: the other side misbehaved or is gone.
        * `ProtocolError`: a message that cannot be understood or is not allowed now.
        * `PeerLostError`: the peer's process or connection ended.
        * `DeadlineError`: a wait passed its deadline; names peer, phase and version.
        * `DigestError`: bytes differ from what their sender said of them; names the tensor.
    * `ResourceError`: this node cannot serve the request now.
        * `ArenaFullError`: the arena has no room; names need and free bytes.
        * `BusyError`: something else is in flight; the request was not begun.
    * `EngineError`: an engine could not be updated; names engine, rank and phase.
        * `VerificationError`: an engine's worker was handed other bytes than were staged.
    * `PublishError`: a published version ended in failure; carries the daemon's reason.

Codes travel on the wire (`ErrorInfo` in `cpe_daemon.wire.messages`); `from_code` rebuilds the error at the other side.
"""

from __future__ import annotations

from typing import ClassVar, Final


class CpeError(Exception):
    """Base of all errors here. ``str(error)`` is one line that a person can act on."""

    code: ClassVar[str] = "internal"

    @property
    def message(self) -> str:
        """The error's text without its code."""
        return str(self)


class MisuseError(CpeError):
    """The caller asked for something that cannot be right."""

    code = "misuse"


class ConfigError(MisuseError):
    """The configuration cannot be used."""

    code = "config"


class ManifestError(MisuseError):
    """A set of tensors is contradictory, incomplete or unsupported."""

    code = "manifest"


class VersionRefusedError(MisuseError):
    """A version may not be published with this run and number now."""

    code = "version_refused"


class LifecycleError(MisuseError):
    """An event is illegal in the present state; the state did not change."""

    code = "lifecycle"


class AccessError(MisuseError):
    """A key is missing, is not allowed at the daemon, or lacks the role for what was asked."""

    code = "access"


class PeerError(CpeError):
    """The other side of a link misbehaved or is gone."""

    code = "peer"


class ProtocolError(PeerError):
    """A message cannot be understood, or is not allowed now; it changed nothing."""

    code = "protocol"


class PeerLostError(PeerError):
    """The peer's process or connection ended."""

    code = "peer_lost"


class DeadlineError(PeerError, TimeoutError):
    """A wait passed its deadline."""

    code = "deadline"


class DigestError(PeerError):
    """Bytes differ from what their sender said of them."""

    code = "digest"


class ResourceError(CpeError):
    """This node cannot serve the request now."""

    code = "resource"


class ArenaFullError(ResourceError):
    """The arena has no room for an extent.

    Args:
        need_bytes: size of the extent asked for, after alignment.
        free_bytes: all free bytes of the arena.
        largest_bytes: the largest free run; an extent must fit in one.
        model: whose quota it is that leaves no room; "" where it is the arena.
        quota_bytes: of that model, of which ``free_bytes`` are free; 0 where it is the arena.
    """

    code = "arena_full"

    def __init__(
        self,
        message: str,
        *,
        need_bytes: int = 0,
        free_bytes: int = 0,
        largest_bytes: int = 0,
        model: str = "",
        quota_bytes: int = 0,
    ) -> None:
        super().__init__(message)
        self.need_bytes = need_bytes
        self.free_bytes = free_bytes
        self.largest_bytes = largest_bytes
        self.model = model
        self.quota_bytes = quota_bytes


class BusyError(ResourceError):
    """Something else is in flight; the request was not begun."""

    code = "busy"


class EngineError(CpeError):
    """An engine could not be updated."""

    code = "engine"


class VerificationError(EngineError):
    """What an engine's worker loaded is not what was staged."""

    code = "verification"


class PublishError(CpeError):
    """A published version ended in failure at a daemon."""

    code = "publish"


_BY_CODE: dict[str, type[CpeError]] = {
    kind.code: kind
    for kind in (
        CpeError,
        MisuseError,
        ConfigError,
        ManifestError,
        VersionRefusedError,
        LifecycleError,
        AccessError,
        PeerError,
        ProtocolError,
        PeerLostError,
        DeadlineError,
        DigestError,
        ResourceError,
        ArenaFullError,
        BusyError,
        EngineError,
        VerificationError,
        PublishError,
    )
}

CODES: Final[tuple[str, ...]] = tuple(_BY_CODE)
"""Every code that there is."""


def from_code(code: str, message: str) -> CpeError:
    """Rebuild the error that a peer reported; an unknown code gives a plain `CpeError`."""
    return _BY_CODE.get(code, CpeError)(message)

"""Which version an engine holds, by name and digest, and whether a round has changed that."""

from __future__ import annotations

from cpe_daemon.core.types import VersionId
from inference_plugins.loader import Loader


class Held:
    """What is known of it. Belongs to the receiver's thread.

    Args:
        loader: the engine.
        loaded: the version that it loaded last, and that one's digest.
    """

    def __init__(self, loader: Loader, loaded: tuple[VersionId | None, bytes] = (None, b"")) -> None:
        self._loader = loader
        self.loaded = loaded
        """The version that was last loaded whole, and its digest; ``b""`` if nobody said it."""
        self._before: tuple[int, VersionId | None, bytes] = (0, None, b"")
        """The last round that was begun here, and what the engine held before it."""

    @property
    def digest(self) -> bytes:
        """The digest of the version that the engine holds; ``b""`` if nobody said it."""
        version, digest = self.loaded
        return digest if version == self._loader.content else b""

    def begin(self, round: int) -> None:
        """A round begins to change it."""
        self._before = round, self._loader.content, self.digest

    def changed(self, round: int) -> bool:
        """Whether the weights are no longer what they were before a round: a mixture, or its version whole."""
        begun, *held = self._before
        return self._loader.touched or (begun == round and held != [self._loader.content, self.digest])

    def learn(self, version: VersionId, digest: bytes) -> None:
        """The digest of a version is known, which may have been loaded without."""
        if self.loaded == (version, b""):
            self.loaded = version, digest
            if self._before[1:] == (version, b""):
                self._before = self._before[0], version, digest

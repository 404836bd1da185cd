"""Which version may be published next: the rule of identity, over what a model has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import MisuseError, VersionRefusedError

_SHOWN_CHARS: Final = 12


@dataclass(frozen=True, slots=True)
class Used:
    """The highest number that a run has staged, and the digest of that version (`cpe_daemon.core.identity`).

    ``digest`` is ``b""`` where nobody knows it: then the number cannot come again.
    """

    number: int
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class History:
    """What a model's versions have used up. Plain values: whoever writes it down and reads it back has the same.

    Args:
        run: the run whose versions are accepted now; None: there was none yet.
        used: by run, its highest number that was staged.
    """

    run: str | None = None
    used: Mapping[str, Used] = field(default_factory=dict)

    def after(self, version: VersionId, digest: bytes = b"") -> History:
        """The history once ``version`` is staged: its run is the present one, its number is used up."""
        highest = self.used.get(version.run)
        if highest is not None and highest.number >= version.number:
            return History(version.run, self.used)
        return History(version.run, {**self.used, version.run: Used(version.number, digest)})

    def lacks_digest(self, version: VersionId) -> bool:
        """Whether a version cannot come again for the sole reason that nobody knows its digest."""
        return self.used.get(version.run) == Used(version.number)

    def learned(self, version: VersionId, digest: bytes) -> History:
        """The history once the digest of a version is known that was staged without one."""
        if not self.lacks_digest(version):
            return self
        return History(self.run, {**self.used, version.run: Used(version.number, digest)})


def admit(history: History, version: VersionId, *, force: bool = False) -> bytes | None:
    """Refuse a version whose number is used up, or whose run was superseded by another.

    ``force`` lets a superseded run return; it never lets a number be used for two contents, for two trainers might then
    mean different weights by one name. The highest number of a run may come again, as the same content: so a trainer
    tries a push again that failed, or brings a version back to a daemon that was restarted.

    Returns:
        The digest that the version must have to be staged (see `check_same`); None if its number is new.

    Raises:
        VersionRefusedError: says which number would be accepted.
    """
    highest = history.used.get(version.run)
    if highest is not None and (
        version.number < highest.number or (version.number == highest.number and not highest.digest)
    ):
        raise VersionRefusedError(
            f"{version} is refused: run {version.run!r} has staged number {highest.number} already;"
            f" publish {highest.number + 1} or higher"
        )
    if history.run not in (None, version.run) and highest is not None and not force:
        raise VersionRefusedError(
            f"{version} is refused: run {version.run!r} was superseded by run {history.run!r};"
            " publish with force to return to it"
        )
    return highest.digest if highest is not None and version.number == highest.number else None


def check_same(version: VersionId, known: bytes | None, digest: bytes) -> None:
    """Refuse a version that comes again as another content.

    Args:
        version: whose number was staged before.
        known: its digest then; None if it was not.
        digest: of what came now.

    Raises:
        VersionRefusedError: names both.
    """
    if known is not None and digest != known:
        raise VersionRefusedError(
            f"{version} is refused: it was staged before with other weights (digest {brief(known)}, now"
            f" {brief(digest)}); publish {version.number + 1} or higher"
        )


def brief(digest: bytes) -> str:
    """The beginning of a digest, for people to compare."""
    return digest.hex()[:_SHOWN_CHARS] or "unknown"


class Numbers:
    """The histories of all models: which numbers and runs are used up on this node."""

    def __init__(self) -> None:
        self._histories: dict[str, History] = {}
        self._live_before: dict[VersionId, bytes] = {}
        """Versions that engines hold and whose bytes are not here, with their digests, until a newer one is staged."""

    @property
    def histories(self) -> Mapping[str, History]:
        """By model; a copy, to be written down."""
        return dict(self._histories)

    def remember(self, model: str, history: History, live: tuple[VersionId, bytes] | None = None) -> None:
        """Go on from what a model's versions had used up when it was written down, before any of them is staged.

        Args:
            model: its name.
            history: of its versions.
            live: the version that was live, and its digest: it may come again, also if later numbers were staged, and
                failed or were taken back.

        Raises:
            MisuseError: one was staged.
        """
        if model in self._histories:
            raise MisuseError(f"versions of {model} have used numbers up already")
        self._histories[model] = history
        if live is not None and live[1]:
            self._live_before[live[0]] = live[1]

    def admit(self, version: VersionId, *, force: bool) -> bytes | None:
        """Decide whether a version may be received: see `admit`."""
        if version in self._live_before:
            return self._live_before[version]
        return admit(self._histories.get(version.model, History()), version, force=force)

    def check(self, version: VersionId, digest: bytes, *, force: bool) -> None:
        """Refuse a version that was received and must not be staged.

        Raises:
            VersionRefusedError: a later number of its run was staged meanwhile, or its own with another digest before;
                or its run was superseded meanwhile.
        """
        check_same(version, self.admit(version, force=force), digest)

    def lacks_digest(self, version: VersionId) -> bool:
        """Whether a version could come again if its digest were known."""
        return self._histories.get(version.model, History()).lacks_digest(version)

    def learn(self, version: VersionId, digest: bytes) -> None:
        """The digest of a version is known that was staged without one: its number may come again."""
        self._histories[version.model] = self._histories.get(version.model, History()).learned(version, digest)

    def use(self, version: VersionId, digest: bytes) -> History:
        """A version is staged: its number is used up. Returns the history before that."""
        before = self._histories.get(version.model, History())
        self._histories[version.model] = before.after(version, digest)
        self._live_before = {live: known for live, known in self._live_before.items() if live.model != version.model}
        return before

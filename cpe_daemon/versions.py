"""The catalogue: it alone owns the versions of this node, their states and their extents.

Ingest, push and peers ask it and tell it; nobody else changes a version. All of it belongs to the event loop. A version
keeps its extents until it is evicted or failed *and* nobody holds a lease on it: whoever reads or writes the bytes
(a copying thread, a push, a peer) takes a lease first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import structlog

from cpe_daemon.arena import Arena
from cpe_daemon.core.admission import Numbers, brief
from cpe_daemon.core.extents import Extent
from cpe_daemon.core.keeping import Keeping
from cpe_daemon.core.lifecycle import VERSION_TABLE, VersionEvent, VersionState, advance
from cpe_daemon.core.manifest import Manifest
from cpe_daemon.core.types import Shard, VersionId, align
from cpe_daemon.errors import ArenaFullError, CpeError, PublishError, VersionRefusedError
from cpe_daemon.version import Contribution, Version
from cpe_daemon.wire.reports import VersionReport

__all__ = ["Catalogue", "Contribution", "Version"]

log = structlog.get_logger(__name__)

_REMEMBERED: Final = 16
"""Versions without bytes that are kept a model, so that status can tell what became of them."""


class Catalogue:
    """All versions of all models.

    Args:
        arena: where extents are cut from.
        retain: previous versions kept a model that is not among ``models``.
        clock: seconds, monotonic.
        automatic: whether a staged version is pushed by itself. Otherwise it waits to be asked for, until a newer one
            of its model is staged and waits in its place.
        supersede: whether one that is to be pushed by itself, and has not been yet, is given up for a newer one too.
        models: by name, what is kept of a model.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        retain: int,
        clock: Callable[[], float],
        automatic: bool = True,
        supersede: bool = False,
        models: Mapping[str, Keeping] | None = None,
    ) -> None:
        self._arena = arena
        self._keeping = Keeping(retain)
        self._models = dict(models or {})
        self._automatic = automatic
        self._supersede = supersede
        self._clock = clock
        self._versions: dict[VersionId, Version] = {}
        self._gone: list[Version] = []
        self.numbers = Numbers()
        """Which numbers and runs are used up; at the start it may be told what was before."""
        self._watchers: list[Callable[[Version], None]] = []
        self._learners: list[Callable[[Version], None]] = []

    def watch(self, watcher: Callable[[Version], None]) -> None:
        """Call ``watcher`` with every version whose state changed, or whose bytes were released, after the change."""
        self._watchers.append(watcher)

    def on_digest(self, learner: Callable[[Version], None]) -> None:
        """Call ``learner`` with every version whose digest became known after it was staged."""
        self._learners.append(learner)

    def __iter__(self) -> Iterator[Version]:
        """All versions known, those without bytes included, oldest first."""
        return iter([*self._gone, *self._versions.values()])

    def find(self, version: VersionId) -> Version | None:
        """The version, if it holds bytes here."""
        return self._versions.get(version)

    def last(self, version: VersionId) -> Version | None:
        """The version, even if it holds no bytes any more and is only remembered."""
        gone = next((known for known in reversed(self._gone) if known.id == version), None)
        return self._versions.get(version) or gone

    def keeping(self, model: str) -> Keeping:
        """What is kept of a model."""
        return self._models.get(model, self._keeping)

    def models(self) -> list[str]:
        """The models that have settings of their own, and those of which versions hold bytes here."""
        return sorted({*self._models, *(version.model for version in self._versions)})

    def used_bytes(self, model: str) -> int:
        """What a model takes of the arena, as its quota counts it."""
        return sum(version.room_bytes for version in self._versions.values() if version.id.model == model)

    def live(self, model: str) -> Version | None:
        """The live version of a model; ``""`` asks for the only model there is.

        With several models, ``""`` gives None: an engine must then say whose weights it wants.
        """
        live = [v for v in self._versions.values() if v.state is VersionState.LIVE and model in ("", v.id.model)]
        return live[0] if len(live) == 1 else None

    def live_models(self) -> list[str]:
        """The models of which a version is live."""
        return [version.id.model for version in self._versions.values() if version.state is VersionState.LIVE]

    # --- receiving ---------------------------------------------------------------------------------------------------

    def open(self, version: VersionId, world_size: int, *, force: bool = False) -> Version:
        """Begin to receive a version, join the ranks that do, or find one that is held: its bytes need not come again.

        Raises:
            VersionRefusedError: its run or number may not be published now, or the ranks disagree on the world size.
        """
        known = self._versions.get(version)
        if known is not None and (known.held or known.state is VersionState.RECEIVING):
            if known.world_size != world_size:
                how = "is held" if known.held else "is being received"
                raise VersionRefusedError(f"{version} {how} from {known.world_size} ranks; this one says {world_size}")
            known.forced |= force
            return known
        if known is not None:  # before it is asked for its digest, which may be made of those bytes
            raise VersionRefusedError(f"{version} {known.state}: its last bytes are still being let go; try again")
        again = self.numbers.admit(version, force=force)
        fresh = self._versions[version] = Version(version, world_size, self._clock(), forced=force)
        log.info("version.receiving", version=str(version), world_size=world_size, again=again is not None)
        self._tell(fresh)
        return fresh

    def contribute(self, version: Version, rank: int, shards: Sequence[Shard], nbytes: int) -> Contribution:
        """Give a rank its extent, evicting retained versions of the model if need be.

        Raises:
            VersionRefusedError: the rank contributes already, or the version is not being received any more.
            ArenaFullError: the arena or the model's quota has no room; naming need and free bytes.
        """
        if version.state is not VersionState.RECEIVING:
            raise VersionRefusedError(f"{version.id} is {version.state}, not receiving")
        if rank in version.contributions:
            raise VersionRefusedError(f"rank {rank} contributes to {version.id} already")
        contribution = Contribution(shards, self._room(version.id, nbytes))
        version.contributions[rank] = contribution
        return contribution

    @property
    def moving(self) -> bool:
        """Whether a version is being received, or is being pushed, or is about to be."""
        moving = {VersionState.RECEIVING, VersionState.PUSHING, *([VersionState.STAGED] if self._automatic else [])}
        return any(version.state in moving for version in self._versions.values())

    def may_make_room(self, model: str = "") -> bool:
        """Whether bytes will be released by themselves, of ``model`` if one is named.

        A push is due or in flight, or old ones are still read.
        """
        return any(
            v.state is VersionState.PUSHING
            or (v.state is VersionState.STAGED and self._automatic)
            or (v.leases and v.state is not VersionState.RECEIVING and v.state is not VersionState.LIVE)
            for v in self._versions.values()
            if model in ("", v.id.model)
        )

    def _room(self, version: VersionId, nbytes: int) -> Extent:
        model = version.model
        keeping = self.keeping(model)
        while True:
            held = self.used_bytes(model)
            try:
                keeping.check(model, held, align(nbytes))
                return self._arena.reserve(nbytes)
            except ArenaFullError as error:
                spare = self._spare(model)
                extents = [part.extent for v in spare for part in v.contributions.values()]
                kept = held - sum(v.room_bytes for v in spare)
                fits = error.need_bytes <= self._arena.largest_free_without(extents)
                if not (spare and fits and keeping.holds(kept + error.need_bytes)):
                    self._add_who_waits(error)
                    raise  # a rollback is not given up for what does not fit even then
                log.warning(
                    "version.evicted_for_room",
                    version=str(spare[0].id),
                    need_bytes=nbytes,
                    for_version=str(version),
                )
                self._change(spare[0], VersionEvent.EVICT)

    def _add_who_waits(self, error: ArenaFullError) -> None:
        """Name the versions that keep their room until somebody acts: a whole one is not given up for a partial one."""
        staged = [v for v in self._versions.values() if v.state is VersionState.STAGED and not self._automatic]
        waiting = [version for version in staged if error.model in ("", version.id.model)]
        if waiting:
            named = ", ".join(f"{version.id} ({version.nbytes} bytes)" for version in waiting)
            error.args = (f"{error.message}; held until `cpe push` (push.automatic is false): {named}",)

    def _spare(self, model: str) -> list[Version]:
        """A model's retained versions that nobody reads, the oldest first."""
        return [version for version in self._retained(model) if not version.leases]

    # --- the life of a version ---------------------------------------------------------------------------------------

    def stage(self, version: Version, manifest: Manifest, fold: int | None = None, digest: bytes = b"") -> None:
        """Every rank has sealed, every digest that one said holds, every tensor is covered once: the version is whole.

        Raises:
            VersionRefusedError: a later number of its run was staged meanwhile, or its own with another digest before;
                or its run was superseded meanwhile.
        """
        self.numbers.check(version.id, digest, force=version.forced)
        with self._changing(version, VersionEvent.STAGE):
            version.manifest = manifest
            version.fold = fold
            version.digest = digest
            version.staged_at = self._clock()
            before = self.numbers.use(version.id, digest)
        if before.run != version.id.run:
            log.info("run.accepted", model=version.id.model, run=version.id.run, superseded=before.run)
        self._supersede_waiting(version.id.model)

    def learn(self, version: Version, digest: bytes) -> None:
        """The digest of a version is known that was staged without one."""
        version.digest = digest
        self.numbers.learn(version.id, digest)
        log.info("version.digested", version=str(version.id), digest=brief(digest))
        for learner in self._learners:
            learner(version)

    def begin_push(self, version: Version) -> None:
        """A round for a staged version begins."""
        with self._changing(version, VersionEvent.PUSH):
            version.pushes += 1

    def put_back(self, version: Version) -> None:
        """A push that was asked for reached no engine: the version waits again, unless a newer one waits by now."""
        self._change(version, VersionEvent.PUT_BACK)
        self._supersede_waiting(version.id.model)

    def _supersede_waiting(self, model: str) -> None:
        """Give up all versions that wait but the newest, unless each is to be pushed in its turn."""
        if self._automatic and not self._supersede:
            return
        waiting = [v for v in self._versions.values() if v.id.model == model and v.state is VersionState.STAGED]
        *older, newest = sorted(waiting, key=lambda version: version.staged_at)
        for version in older:
            with self._changing(version, VersionEvent.SUPERSEDE):
                before = "its turn came (push.newer: supersede)" if self._automatic else "anybody pushed it"
                version.error = PublishError(f"{version.id} was superseded by {newest.id} before {before}")

    def go_live(self, version: Version, report: VersionReport) -> None:
        """The engines serve it; the version that was live is retained as far as the policy says.

        Args:
            version: it was pushed, or it was live once and was given to the engines again.
            report: what that push did.

        Raises:
            LifecycleError: it is neither, and nothing has changed.
        """
        previous = self.live(version.id.model)
        with self._changing(version, VersionEvent.GO_LIVE):
            version.report = report
        if previous is not None:
            with self._changing(previous, VersionEvent.SUPERSEDE):
                previous.live_until = self._clock()
        retained = self._retained(version.id.model)
        for surplus in retained[: max(0, len(retained) - self.keeping(version.id.model).versions)]:
            self._change(surplus, VersionEvent.EVICT)

    def fail(self, version: Version, error: CpeError) -> None:
        """Give a version up and let its bytes go."""
        with self._changing(version, VersionEvent.FAIL):
            version.error = error

    def evict(self, version: Version) -> None:
        """Let go of a version that is live or retained, since an operator says so, who looked whether it is needed.

        Raises:
            LifecycleError: it is neither, and nothing has changed.
        """
        with self._changing(version, VersionEvent.EVICT):
            version.error = PublishError(f"{version.id} was evicted by an operator")

    @contextlib.contextmanager
    def lease(self, version: Version) -> Iterator[Version]:
        """Keep a version's extents from being reused while the context is open; of no use for one that has none."""
        version.leases += 1
        try:
            yield version
        finally:
            version.leases -= 1
            if not version.leases and version.state in (VersionState.EVICTED, VersionState.FAILED):
                self._release(version)

    def _retained(self, model: str) -> list[Version]:
        """A model's retained versions, the one that was live last at the end."""
        retained = [v for v in self._versions.values() if v.id.model == model and v.state is VersionState.RETAINED]
        return sorted(retained, key=lambda version: version.live_until)

    def _change(self, version: Version, event: VersionEvent) -> None:
        with self._changing(version, event):
            pass

    @contextlib.contextmanager
    def _changing(self, version: Version, event: VersionEvent) -> Iterator[None]:
        """Change a version's state; what goes with the change is written inside, and nothing if the event is illegal.

        Raises:
            LifecycleError: the event is illegal now.
        """
        state = advance(VERSION_TABLE, version.state, event)
        yield
        version.state = state
        error = version.error.message if version.error else None
        log.info(
            "version.changed", version=str(version.id), state=str(version.state), nbytes=version.nbytes, error=error
        )
        self._tell(version)
        if version.state in (VersionState.EVICTED, VersionState.FAILED) and not version.leases:
            self._release(version)

    def _release(self, version: Version) -> None:
        """Free a dead version's extents and keep it only as a memory, unless that was done."""
        if self._versions.get(version.id) is not version:
            return
        for contribution in version.contributions.values():
            self._arena.release(contribution.extent)
        version.contributions.clear()
        version.manifest = None
        del self._versions[version.id]
        self._gone = [*self._gone, version][-_REMEMBERED:]
        self._tell(version)

    def _tell(self, version: Version) -> None:
        for watcher in self._watchers:
            watcher(version)

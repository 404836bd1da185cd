"""Which engines a push is meant for, which of them a round can take, and what is to be reported of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import EngineError, MisuseError
from cpe_daemon.push.participant import Participant
from cpe_daemon.versions import Version
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport


class Targets:
    """The engines that a push of a version is meant for. Made when the push begins, and of no use after it.

    Without names: all that take versions of its model, attached or expected; those that hold it already need no push.
    An engine that is named is pushed whatever it is thought to hold: somebody may know better.

    Args:
        registry: of the engines.
        version: staged, live or retained.
        names: only these.
        defer: pass over those that are asleep.

    Raises:
        MisuseError: a name is not known, or is that of an engine of another model.
        EngineError: none of those that are named can be pushed to.
    """

    def __init__(self, registry: Registry, version: Version, names: Iterable[str] = (), *, defer: bool = True) -> None:
        self._version = version
        self._model = version.id.model
        self._defer = defer
        self._was_live = version.state in (VersionState.LIVE, VersionState.RETAINED)
        """If not, an engine may hold it from a daemon before this one; then it has to know the digest."""
        self.engines: list[Engine] = []
        """Those that a round can take."""
        self._others: dict[str, EngineReport] = {}
        names = tuple(dict.fromkeys(names))
        for name in names:
            self._add_named(registry, name)
        if names and not self.engines:
            reasons = (report.error.message for report in self._others.values() if report.error is not None)
            raise EngineError(f"{version.id} was pushed to no engine: {'; '.join(reasons)}")
        if not names:
            self._add_all(registry)

    def report(self, participants: Sequence[Participant], seconds: float) -> VersionReport:
        """What became of every engine, of those that were left out too."""
        manifest = self._version.manifest
        engines = {engine.name: _incomplete(engine) for engine in self.engines}
        engines |= {participant.engine.name: participant.report() for participant in participants}
        return VersionReport(
            self._version.id,
            manifest.nbytes if manifest else 0,
            len(manifest.tensors) if manifest else 0,
            self._version.stage_seconds,
            seconds,
            engines | self._others,
        )

    def _add_named(self, registry: Registry, name: str) -> None:
        engine, spec = registry.find(name), registry.expected.get(name)
        serves = engine.serves if engine is not None else spec.model if spec is not None else ""
        if engine is None and spec is None:
            known = [known.name for known in registry] + [absent.name for absent in registry.absent]
            raise MisuseError(f"no engine {name!r} is known here; there is: {', '.join(known) or 'none'}")
        if serves not in ("", self._model):
            raise MisuseError(f"engine {name!r} serves {serves}, and {self._version.id} is of {self._model}")
        if engine is not None:
            self._add(engine)
        elif spec is not None:
            self._others[name] = _absent(f"engine {name!r}: {registry.expected.why_absent(spec)}")

    def _add_all(self, registry: Registry) -> None:
        for engine in registry:
            counted = engine.workers or registry.expected.get(engine.name)
            if not counted or not engine.takes(self._model):
                continue
            holds_it = engine.ready and engine.holds(self._version.id, self._version.digest)
            if holds_it and (self._was_live or engine.digest == self._version.digest != b""):
                self._others[engine.name] = EngineReport("current")
            else:
                self._add(engine)
        for spec in registry.absent:
            if spec.model in ("", self._model):
                self._others[spec.name] = _absent(registry.expected.why_absent(spec))

    def _add(self, engine: Engine) -> None:
        if not engine.complete:
            self._others[engine.name] = _incomplete(engine)
        elif engine.asleep and self._defer:
            why = f"engine {engine.name!r} is asleep; it gets the live version when it wakes up"
            self._others[engine.name] = EngineReport("asleep", error=ErrorInfo(EngineError.code, why))
        else:
            self.engines.append(engine)


def without(report: VersionReport, version: Version, taken: Iterable[Engine]) -> VersionReport:
    """The report of a push whose version was taken back: those that took it serve what they held, or are in doubt."""
    engines = dict(report.engines)
    for engine in taken:
        serves = engine.ready and not engine.holds(version.id, version.digest)
        outcome = "taken back" if serves else "kept" if engine.ready else "failed"
        error = ErrorInfo(engine.error.code, engine.error.message) if engine.error is not None else None
        engines[engine.name] = replace(engines[engine.name], outcome=outcome, error=error)
    return replace(report, engines=engines)


def _incomplete(engine: Engine) -> EngineReport:
    return _absent(
        f"ranks {engine.missing_ranks} of {engine.world_size} are not attached; it gets the live version when they are"
    )


def _absent(reason: str) -> EngineReport:
    return EngineReport("absent", error=ErrorInfo(EngineError.code, reason))

"""Whether an engine that attaches may serve what its workers say they hold."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from cpe_daemon.core.identity import may_be_same
from cpe_daemon.core.journal import Identity
from cpe_daemon.core.recovery import Before
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.wire.messages import WorkerHello

_MIXED: Final = "its weights may be a mixture of versions: an update of it was cut short"
_DISAGREE: Final = "its workers hold different versions"


class Adoption:
    """Compares what engines hold with what is live, or was live before this daemon. Belongs to the event loop.

    Args:
        live: the live version of a model, with its digest, if there is one whose bytes are here.
        live_models: the models of which one is.
        before: what was live when this daemon began.
    """

    def __init__(
        self, live: Callable[[str], Identity | None], live_models: Callable[[], Collection[str]], before: Before
    ) -> None:
        self._live = live
        self._live_models = live_models
        self.before = before

    @property
    def models(self) -> list[str]:
        """The models that this node serves: of which a version is live, or was before this daemon."""
        return sorted({*self._live_models(), *self.before.models})

    def must_hold(self, engine: Engine, hello: WorkerHello) -> bool:
        """Whether a worker must not serve what it holds: it is a mixture, not live, or not what its siblings hold."""
        siblings = {(worker.content, worker.touched) for worker in engine.workers.values()}
        apart = len(siblings) > 1 or _named_alike_only(engine)
        return hello.touched or apart or bool(self._objection(engine, hello.content, hello.digest))

    def objection(self, engine: Engine) -> str:
        """Why a complete engine may serve nothing before it is given a version; "" if it may serve what it holds."""
        contents = {worker.content for worker in engine.workers.values()}
        if any(worker.touched for worker in engine.workers.values()):
            return _MIXED
        if len(contents) > 1 or _named_alike_only(engine):
            return _DISAGREE
        return self._objection(engine, contents.pop(), engine.digest)

    def _objection(self, engine: Engine, content: VersionId | None, digest: bytes) -> str:
        live = self._live(engine.serves)
        if live is None:
            return self.before.objection(engine.serves, Identity(content, digest) if content is not None else None)
        if content != live.version:
            return f"it does not hold {live}, which is live"
        return "" if may_be_same(live.digest, digest) else f"it holds other weights by the name of {live}, the live one"


def _named_alike_only(engine: Engine) -> bool:
    """Whether its workers hold different weights by one name."""
    return len({worker.digest for worker in engine.workers.values()} - {b""}) > 1


def model_of(hello: WorkerHello) -> str:
    """The model that a worker is for: as it says, else of the version that it holds; "" if it says neither."""
    return hello.model or (hello.content.model if hello.content is not None else "")

"""The conversation of an operator's command with the daemon."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cpe_daemon.core.types import VersionId
from cpe_daemon.wire.message import PROTOCOL, Message
from cpe_daemon.wire.reports import VersionReport


class StatusRequest(Message, frozen=True, tag="status_request"):
    """Ask for the whole state of the daemon."""

    protocol: int = PROTOCOL


class StatusReply(Message, frozen=True, tag="status_reply"):
    """The state of the daemon, as plain JSON-able values; keys are documented in ``cpe status --help``."""

    status: dict[str, Any]


class PushRequest(Message, frozen=True, tag="push_request"):
    """Push a version that this node holds into engines of its model; answered by a `PushReply` when it has ended.

    Without ``run`` and ``number`` (-1): the newest that is staged and waits, else the live one. Without ``engines``:
    all that serve the model, but for those that hold it already. ``model`` "": the only one that there is.

    ``dry_run``: push nothing, and pause nobody, but ask every engine whether it could load the version.
    """

    model: str
    run: str = ""
    number: int = -1
    engines: tuple[str, ...] = ()
    dry_run: bool = False


class RollbackRequest(Message, frozen=True, tag="rollback_request"):
    """Push a retained version of a model into all its engines; answered as `PushRequest` is.

    Without ``number`` (-1): the retained version that was live last. ``model`` "": the only one that there is.
    """

    model: str = ""
    run: str = ""
    number: int = -1


class EvictRequest(Message, frozen=True, tag="evict_request"):
    """Let go of versions that nobody serves; answered by `Done`. Refused as a whole if an engine needs one of them.

    Without ``run``: those of all of the model's. Without ``number`` (-1): all numbers.
    """

    model: str
    run: str = ""
    number: int = -1


class PushReply(Message, frozen=True, tag="push_reply"):
    """What a push or a rollback that somebody asked for did; ``stream`` is the trainer's, 0 for an operator."""

    report: VersionReport
    stream: int = 0


class WaitRequest(Message, frozen=True, tag="wait_request"):
    """Tell when version ``number`` of a run, or a later one, is live here; answered by a `WaitReply`, or an error.

    An error comes at once if the version has failed, and as a deadline after ``seconds``. Said again, it replaces the
    one before, and the seconds begin anew: whoever waits says so every `WAIT_AGAIN_SECONDS`, or is forgotten. ``run``
    "": the newest of the model's. ``model`` "": the only one that there is, or the first.
    """

    number: int
    seconds: float
    model: str = ""
    run: str = ""


class WaitReply(Message, frozen=True, tag="wait_reply"):
    """That version is live on this node; ``stream`` is the trainer's, 0 for an operator."""

    version: VersionId
    stream: int = 0


WAIT_AGAIN_SECONDS: Final = 5.0
WAIT_FORGOTTEN_SECONDS: Final = 20.0
"""An operator who waits says so that often, and is forgotten after so long without: clients have no goodbye."""


class EngineSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """An engine that an operator expects on this node. Empty and 0: whatever it says itself.

    ``url`` is for engines that are driven by their own HTTP API.
    """

    name: str
    kind: str
    model: str = ""
    url: str = ""
    world_size: int = 0


class EngineAdd(Message, frozen=True, tag="engine_add"):
    """Expect an engine from now on, after a restart too; answered by `Done`."""

    engine: EngineSpec


class EngineRemove(Message, frozen=True, tag="engine_remove"):
    """Expect an engine no longer, and forget it if none of its workers is attached; answered by `Done`."""

    engine: str


class Done(Message, frozen=True, tag="done"):
    """What an operator asked for was done; ``detail`` is one line for a person."""

    detail: str = ""

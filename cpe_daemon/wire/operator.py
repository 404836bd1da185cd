"""The conversation of an operator's command with the daemon."""

from __future__ import annotations

from typing import Any

import msgspec

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
    """

    model: str
    run: str = ""
    number: int = -1
    engines: tuple[str, ...] = ()


class PushReply(Message, frozen=True, tag="push_reply"):
    """What a push that an operator asked for did."""

    report: VersionReport


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

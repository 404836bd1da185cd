"""Where the daemon keeps its sockets and its state when nobody says where, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SYSTEM_DIR: Final = Path("/run/cpe")
SYSTEM_STATE_DIR: Final = Path("/var/lib/cpe-daemon")
SYSTEM_KEYS_DIR: Final = Path("/etc/cpe-daemon/keys")
FRONT_SOCKET: Final = "front.sock"
"""Trainers and operators connect here; always there, whatever else is listened on."""

ENGINES_SOCKET: Final = "engines.sock"
"""Engine workers attach here."""

HANDOFF_SOCKET: Final = "handoff.sock"
"""Memory is handed to processes of this host here."""

ENGINES_FILE: Final = "engines.json"
"""The engines that an operator expects on this node; in the state directory."""

JOURNAL_FILE: Final = "journal.json"
"""What the next daemon shall know of this one's versions and engines; in the state directory."""


def default_runtime_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where the daemon runs unless told otherwise, so that its clients look in the same place.

    ``/run/cpe`` for root and wherever it exists (the systemd unit makes it), else ``$XDG_RUNTIME_DIR/cpe``,
    else ``/tmp/cpe-<uid>``.
    """
    environ = os.environ if environ is None else environ
    uid = os.getuid()
    if uid == 0 or SYSTEM_DIR.is_dir():
        return SYSTEM_DIR
    personal = environ.get("XDG_RUNTIME_DIR", "")
    if personal.startswith("/"):
        return Path(personal) / "cpe"
    return Path(f"/tmp/cpe-{uid}")  # noqa: S108 - the daemon refuses it unless it owns it


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where the daemon keeps what it shall know after a restart, unless told otherwise.

    ``/var/lib/cpe-daemon`` for root and where it can be written to (the systemd unit makes it, for the service's user),
    else ``$XDG_STATE_HOME/cpe``, else ``~/.local/state/cpe``.
    """
    environ = os.environ if environ is None else environ
    if os.getuid() == 0 or os.access(SYSTEM_STATE_DIR, os.R_OK | os.W_OK | os.X_OK):
        return SYSTEM_STATE_DIR
    personal = environ.get("XDG_STATE_HOME", "")
    if personal.startswith("/"):
        return Path(personal) / "cpe"
    return Path(environ.get("HOME") or os.path.expanduser("~")) / ".local" / "state" / "cpe"


def default_keys_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where keys are kept unless told otherwise.

    ``/etc/cpe-daemon/keys`` for root, where it can be read, and for the service (systemd tells it its directory), else
    ``$XDG_CONFIG_HOME/cpe/keys``, else ``~/.config/cpe/keys``.
    """
    environ = os.environ if environ is None else environ
    service = environ.get("CONFIGURATION_DIRECTORY", "")
    if service.startswith("/") and ":" not in service:
        return Path(service) / "keys"
    if os.getuid() == 0 or os.access(SYSTEM_KEYS_DIR, os.R_OK | os.X_OK):
        return SYSTEM_KEYS_DIR
    personal = environ.get("XDG_CONFIG_HOME", "")
    if personal.startswith("/"):
        return Path(personal) / "cpe" / "keys"
    return Path(environ.get("HOME") or os.path.expanduser("~")) / ".config" / "cpe" / "keys"

"""Where an engine's worker finds the daemon of its node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SOCKET_ENV: Final = "CPE_ENGINES_SOCKET"
DEFAULT_SOCKET: Final = "ipc:///run/cpe/engines.sock"


def engines_endpoint(socket: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Spell the daemon's socket for engines out as an endpoint.

    Args:
        socket: ``ipc://PATH``, the path, or the daemon's runtime directory; None: as the environment says.
        environ: whose ``CPE_ENGINES_SOCKET`` counts then, if it is set.
    """
    given = socket or environ.get(SOCKET_ENV) or DEFAULT_SOCKET
    if "://" in given:
        return given
    path = Path(given)  # of a directory that may be made later, or of the socket in it
    return f"ipc://{path if path.suffix == '.sock' or path.is_socket() else path / 'engines.sock'}"

"""A daemon as the zygote forks it: the same command line, without the second that its imports take."""

from __future__ import annotations

from typing import Any

import uvloop  # noqa: F401 - so that children need not

import cpe_daemon.daemon
import cpe_daemon.observe.logs  # noqa: F401 - so that children need not
from cpe_daemon.cli import main as cpe


def main(arguments: dict[str, Any]) -> None:
    cpe(["serve", "--config", arguments["config"]], prog_name="cpe")

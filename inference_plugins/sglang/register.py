"""Hooks versions of the daemon's into SGLang; an entry point of ``sglang.srt.plugins``."""

from __future__ import annotations

import logging
import sys
from typing import Final

from cpe_daemon.errors import EngineError
from inference_plugins.sglang.compat import check_version
from inference_plugins.sglang.settings import wanted

log: Final = logging.getLogger(__name__)

_MODULE: Final = "sglang.srt.managers.scheduler"


def register() -> None:
    """Register the hooks, if this server is to take versions; SGLang calls this in each of its processes.

    Raises:
        SystemExit: this is no SGLang that can be updated. SGLang would pass over any other error, and serve.
    """
    if not wanted():
        log.info("cpe: not asked for; CPE_ENGINES_SOCKET says where the daemon is")
        return
    try:
        check_version()
    except EngineError as error:
        raise SystemExit(f"cpe: {error.message}") from None
    if _MODULE not in sys.modules:
        return  # no scheduler: what is to be hooked would be imported for nothing
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from inference_plugins.sglang.hooks import HOOKS

    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AROUND)

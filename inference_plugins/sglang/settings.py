"""What an SGLang worker is told by its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, Self

from inference_plugins.endpoint import SOCKET_ENV
from inference_plugins.settings import WorkerSettings

_NAMES: Final = (SOCKET_ENV, "CPE_ENGINE", "CPE_ENGINE_URL", "CPE_MODEL")
_PREFIX: Final = "CPE_SGLANG_"


class Settings(WorkerSettings):
    """Of one server: ``CPE_SGLANG_START`` and the like (see `WorkerSettings`)."""

    __slots__ = ()

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read them.

        Raises:
            ConfigError: one makes no sense; says which.
        """
        return cls.of("sglang", environ)


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a server is to take versions at all: SGLang loads every plugin that is installed beside it."""
    return any(value and (name in _NAMES or name.startswith(_PREFIX)) for name, value in environ.items())

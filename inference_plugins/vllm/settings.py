"""What a vLLM worker is told by its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Self

from inference_plugins.settings import WorkerSettings


class Settings(WorkerSettings):
    """Of one server: ``CPE_VLLM_START`` and the like (see `WorkerSettings`)."""

    __slots__ = ()

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read them.

        Raises:
            ConfigError: one makes no sense; says which.
        """
        return cls.of("vllm", environ)

"""Settings of single models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field

from cpe_daemon.config.section import TIB, Bytes, Section
from cpe_daemon.core.keeping import Keeping


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"is a number, not {str(value).lower()}")
    return value


class ModelConfig(Section):
    """What this node keeps of one model."""

    model_config = ConfigDict(validate_default=False)

    quota_bytes: Bytes = Field(
        default=0,
        ge=0,
        le=64 * TIB,
        description="Most bytes of the arena that all its versions take together, those that are being received "
        "included. What would be more has its retained versions evicted, and is refused where that is not enough. 0: "
        "no quota.",
    )
    versions: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None,
        ge=0,
        le=1000,
        description="Its previous versions kept for rollback, room permitting. Default: retention.versions.",
    )


ModelName = Annotated[str, Field(min_length=1, max_length=256)]
"""As trainers publish it."""


def keeping(models: Mapping[str, ModelConfig], versions: int) -> dict[str, Keeping]:
    """By model that has settings of its own, what is kept of it; ``versions`` where it does not say how many."""
    return {
        name: Keeping(versions if model.versions is None else model.versions, model.quota_bytes)
        for name, model in models.items()
    }


def named_section(annotation: object) -> type[Section] | None:
    """The section that a field has under each of any names; None for every other field."""
    arguments = get_args(annotation)
    if get_origin(annotation) is dict and isinstance(arguments[1], type) and issubclass(arguments[1], Section):
        return arguments[1]
    return None

"""What every section of the settings is made of: its base, and the types with units."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from cpe_daemon.config.units import parse_bytes, parse_seconds

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""A size; a string may carry a unit."""

Seconds = Annotated[float, BeforeValidator(parse_seconds)]
"""A duration; a string may carry a unit."""


class Section(BaseModel):
    """Base of all settings: immutable, and closed to names that are not settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_lookalikes(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what lax conversion would let through with a meaning that nobody meant."""
        if value is None:
            raise ValueError("has no value; write one, or remove the line for the default")
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation in {int, float}:
            raise ValueError(f"is a number, not {str(value).lower()}")
        return value

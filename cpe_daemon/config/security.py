"""Where the daemon's keys are."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from cpe_daemon.config.endpoints import check_absolute
from cpe_daemon.config.paths import default_keys_dir
from cpe_daemon.config.section import Section


class SecurityConfig(Section):
    """Keys, without which nobody may connect over tcp; docs/SECURITY.md says what they protect and what they do not."""

    keys_dir: Path = Field(
        default_factory=default_keys_dir,
        description="Holds the daemon's key pair (daemon.key_secret) and the keys that may connect (allowed);"
        " `cpe keys` writes both. Default: /etc/cpe-daemon/keys for root, for the service, and where it"
        " can be read, else $XDG_CONFIG_HOME/cpe/keys, else ~/.config/cpe/keys.",
    )

    @field_validator("keys_dir")
    @classmethod
    def _usable_keys_dir(cls, value: Path) -> Path:
        check_absolute(value)
        return value

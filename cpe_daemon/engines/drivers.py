"""Finds the daemon's half of each plugin by its entry point, never by importing an engine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

from cpe_daemon.core.driver import Driver
from cpe_daemon.errors import ConfigError

GROUP: Final = "cpe_daemon.engines"


def load_drivers() -> Mapping[str, type[Driver]]:
    """Return every installed driver by the kind of engine that it is for.

    Raises:
        ConfigError: a plugin cannot be imported, or none is installed.
    """
    drivers: dict[str, type[Driver]] = {}
    for point in entry_points(group=GROUP):
        try:
            drivers[point.name] = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"engine plugin {point.name!r} ({point.value}) cannot be imported: {error}") from error
    if not drivers:
        raise ConfigError(f"no engine plugin is installed (entry points of group {GROUP!r}); reinstall cpe-daemon")
    return drivers

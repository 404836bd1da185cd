"""A conformance kit for plugins of engines: plays the daemon against a real worker, and says what was not kept.

It needs what a plugin needs, and no test framework. docs/PLUGINS.md shows how it is used.
"""

from __future__ import annotations

from inference_plugins.testing.errors import ConformanceError
from inference_plugins.testing.plugin import LoaderWorker, Plugin, Tensors
from inference_plugins.testing.scenarios import SCENARIOS, Scenario, check

__all__ = ["SCENARIOS", "ConformanceError", "LoaderWorker", "Plugin", "Scenario", "Tensors", "check"]

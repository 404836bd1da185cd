"""What the kit raises."""

from __future__ import annotations

from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.wire.reports import ErrorInfo


class ConformanceError(EngineError):
    """A plugin does not do what is promised to the daemon; says what, and in which step."""


class StepRefusedError(EngineError):
    """The worker answered a step by a failure: what a scenario may wait for, or not.

    Args:
        step: its name, as on the wire.
        error: the answer.
    """

    def __init__(self, step: str, error: ErrorInfo) -> None:
        super().__init__(f"{step} failed: {error.message} ({error.code})")
        self.step = step
        self.error = error


class NotApplicableError(CpeError):
    """The plugin does not say how to do what the scenario is about; says what is missing."""

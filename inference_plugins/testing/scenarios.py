"""The scenarios by name, and `check`, which plays them all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from inference_plugins.testing import failing, living, updating
from inference_plugins.testing.errors import ConformanceError, NotApplicableError
from inference_plugins.testing.plugin import Plugin


@dataclass(frozen=True)
class Scenario:
    """One thing that a daemon does to an engine.

    Attributes:
        play: raises unless the plugin does what is promised.
    """

    play: Callable[[Plugin[Any]], None]

    @property
    def name(self) -> str:
        """By which it is asked for."""
        return self.play.__name__

    @property
    def about(self) -> str:
        """What happens in it, and what has to come of it; one line."""
        return (self.play.__doc__ or "").strip()

    def __str__(self) -> str:
        return self.name

    def run(self, plugin: Plugin[Any]) -> str:
        """Play it with a new engine.

        Returns:
            "" if the plugin passed; else what it has to tell of itself for the scenario to apply.

        Raises:
            ConformanceError: it did not pass; says what happened where.
        """
        try:
            self.play(plugin)
        except NotApplicableError as error:
            return error.message
        except ConformanceError as error:
            raise ConformanceError(f"{self.name}: {error.message}") from error
        except Exception as error:  # task boundary: what an engine raises here is a finding about its plugin
            raise ConformanceError(f"{self.name}: {type(error).__name__}: {error}") from error
        return ""


SCENARIOS: Final[tuple[Scenario, ...]] = tuple(
    Scenario(play)
    for play in (
        updating.module_groups,
        updating.one_bucket,
        updating.split_tensors,
        updating.any_order,
        updating.views_let_go,
        updating.same_version_again,
        updating.content_is_told,
        failing.asked_while_serving,
        failing.tensor_missing,
        failing.tensor_unknown,
        failing.wrong_shape,
        failing.wrong_dtype,
        failing.aborted_at_each_bucket,
        failing.aborted_after_finish,
        failing.failed_in_the_middle,
        failing.incomplete,
        failing.other_bytes,
        living.paused_and_resumed_twice,
        living.resumed_with_another_version,
        living.daemon_lost,
        living.held_back,
        living.busy,
        living.asleep,
    )
)


def check(plugin: Plugin[Any], *, only: Collection[str] = ()) -> dict[str, str]:
    """Play all scenarios, each with a new engine.

    Args:
        plugin: what is tried.
        only: names of scenarios; all if empty.

    Returns:
        By name of the scenario, why it does not apply; "" for one that was passed.

    Raises:
        ConformanceError: some were not passed; says which, and why.
    """
    outcomes, failures = dict[str, str](), list[str]()
    for scenario in SCENARIOS:
        if only and scenario.name not in only:
            continue
        try:
            outcomes[scenario.name] = scenario.run(plugin)
        except ConformanceError as error:
            failures.append(error.message)
    if failures:
        raise ConformanceError(f"{len(failures)} of {len(failures) + len(outcomes)} scenarios: " + "\n".join(failures))
    return outcomes

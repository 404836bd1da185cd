"""Scenarios around rounds: pauses, a daemon that dies, an engine that is held back, busy or asleep."""

from __future__ import annotations

from typing import Any, Final

from cpe_daemon.wire.messages import Abort, Pause, Resume, WorkerState
from inference_plugins.testing.errors import ConformanceError, NotApplicableError
from inference_plugins.testing.plugin import Plugin
from inference_plugins.testing.stage import Stage
from inference_plugins.testing.version import Version

_POINTS: Final = ((None, False), (0.0, False), (0.34, False), (0.67, False), (1.0, False), (1.0, True))
"""Of a round: the part of the buckets that were loaded (None: not begun), and whether the loading was finished."""


def paused_and_resumed_twice(plugin: Plugin[Any]) -> None:
    """It is paused when it is paused, and resumed when it serves: either does nothing then."""
    with Stage(plugin) as stage:
        version = stage.version()
        stage.push(version)
        for _ in range(2):
            stage.round += 1
            for _ in range(2):
                stage.pause()
            for _ in range(2):
                stage.resume(version.id)
        stage.must_hold(version)
        stage.push(stage.version())


def resumed_with_another_version(plugin: Plugin[Any]) -> None:
    """It is to serve a version that it does not hold: it refuses."""
    with Stage(plugin) as stage:
        held, other = stage.version(), stage.version()
        stage.push(held)
        stage.round += 1
        stage.pause()
        for content in (other.id, None):
            stage.refused(Resume(stage.round, content), f"although it holds {held}, and {content} was named")
            stage.must_not_serve("it was paused")
        stage.resume(held.id)


def daemon_lost(plugin: Plugin[Any]) -> None:
    """The daemon dies at each point of a round: the engine serves a whole version, or stays paused, and says which."""
    with Stage(plugin) as stage:
        held = stage.version()
        stage.push(held)
        for buckets, finished in _POINTS:
            new = stage.version()
            stage.round += 1
            stage.pause()
            if buckets is not None:
                stage.begin(new)
                stage.load(new, range(round(buckets * len(new.buckets))))
            if finished:
                stage.finish()
            _survives(stage, held, new)
            stage.push(held)


def held_back(plugin: Plugin[Any]) -> None:
    """The daemon tells it not to serve what it holds: it stays paused until it was given a version, and resumed."""
    with Stage(plugin) as stage:
        held = stage.version()
        stage.push(held)
        stage.lose()
        stage.daemon.welcome(hold=True)
        stage.open_slots()
        stage.must_not_serve("the daemon told it to wait for a version")
        stage.lose()
        stage.must_not_serve("the daemon that told it to wait was lost")
        stage.daemon.welcome(hold=True)
        stage.open_slots()
        stage.push(stage.version())


def busy(plugin: Plugin[Any]) -> None:
    """A forward pass does not end: the pause fails at its deadline, nothing is touched, and the engine serves on."""
    if plugin.forward is None:
        raise NotApplicableError("Plugin.forward is not given")
    with Stage(plugin) as stage:
        held = stage.version()
        stage.push(held)
        stage.round += 1
        with plugin.forward(stage.engine):
            error = stage.refused(Pause(stage.round, 0.2), "although a forward pass was under way")
            if error.error.code != "deadline":
                raise ConformanceError(f"a pause that is late raises a DeadlineError: {error}")
            if stage.ask(Abort(stage.round, "it did not pause")).touched:
                raise ConformanceError("it did not even pause, and said that weights had been touched")
            stage.resume(held.id)
        stage.must_hold(held)
        stage.push(stage.version())


def asleep(plugin: Plugin[Any]) -> None:
    """It lends its memory to others: it refuses all steps meanwhile, and serves nothing but known weights after."""
    if plugin.sleep is None or plugin.wake_up is None:
        raise NotApplicableError("Plugin.sleep and Plugin.wake_up are not given")
    with Stage(plugin) as stage:
        held = stage.version()
        stage.push(held)
        for kept in (True, False):
            plugin.sleep(stage.engine)
            _told(stage, asleep=True)
            stage.must_not_serve("it is asleep")
            stage.round += 1
            stage.refused(Pause(stage.round, 1.0), "although it is asleep")
            stage.refused(Resume(stage.round, held.id), "although it is asleep")
            plugin.wake_up(stage.engine, kept)
            state = _told(stage, asleep=False)
            stage.must_not_serve("it was not resumed since it slept")
            if kept and (state.content, state.touched) != (held.id, False):
                raise ConformanceError(f"its weights were kept, and it said {state}")
            stage.open_slots()
            if kept:
                stage.resume(held.id)
                stage.must_hold(held, "its weights were kept")
            else:
                stage.must_refuse_to_resume(held)
                stage.push(held)


def _told(stage: Stage, *, asleep: bool) -> WorkerState:
    state = stage.expect(WorkerState, "word that it sleeps" if asleep else "word that it is awake")
    if state.asleep is not asleep:
        raise ConformanceError(f"it said {state}")
    return state


def _survives(stage: Stage, held: Version, new: Version) -> None:
    """Kill the daemon, and take the worker in again, as a daemon that knows nothing of the round."""
    hello = stage.lose()
    versions = {version.id: version for version in (held, new)}
    if hello.touched:
        stage.must_not_serve("its weights may be a mixture")
    elif hello.content in versions:
        version = versions[hello.content]
        stage.must_hold(version, "it said so, and that nothing was touched")
        if hello.digest != version.digest:
            raise ConformanceError(f"it holds {version}, and named another digest")
    else:
        raise ConformanceError(f"it held {held}, and says now that it holds {hello.content}, and untouched")
    stage.daemon.welcome(hold=hello.touched)
    stage.open_slots()
    if hello.touched:
        stage.must_refuse_to_resume(held)

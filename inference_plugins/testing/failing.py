"""Scenarios in which an update fails: the engine says so, serves no mixture, and has its weights again afterwards."""

from __future__ import annotations

from typing import Any, Final

import torch
from msgspec.structs import replace

from cpe_daemon.wire.messages import Finish
from inference_plugins.testing.errors import ConformanceError, StepRefusedError
from inference_plugins.testing.plugin import Plugin
from inference_plugins.testing.stage import Stage
from inference_plugins.testing.version import Version

_MOST_ABORTS: Final = 16
_OTHER: Final = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def tensor_missing(plugin: Plugin[Any]) -> None:
    """A tensor is missing: the version is refused, at the latest by `finish`."""
    with Stage(plugin) as stage:
        held = _first(stage)
        for announced in (True, False):
            tensors = dict(plugin.checkpoint(2))
            del tensors[stage.needed]
            if _fails(stage, stage.version(tensors), held, announced=announced) is None:
                raise ConformanceError(f"a version without {stage.needed} was taken for whole")


def tensor_unknown(plugin: Plugin[Any]) -> None:
    """There is a tensor too many: the version is refused, or that tensor is passed over and the others are right."""
    with Stage(plugin) as stage:
        held = _first(stage)
        tensors = dict(plugin.checkpoint(2)) | {"conformance.unknown.weight": torch.ones(4, 4)}
        if _fails(stage, stage.version(tensors), held) is None:
            stage.must_hold(stage.version(plugin.checkpoint(2)), "it was taken with a tensor more")
        stage.push(stage.version())


def wrong_shape(plugin: Plugin[Any]) -> None:
    """A tensor has another shape than the one before it: the version is refused."""
    with Stage(plugin) as stage:
        held = _first(stage)
        for change in (lambda t: torch.cat([t, t[:1]]), lambda t: t[:-1]):
            tensors = dict(plugin.checkpoint(2))
            tensors[stage.needed] = change(tensors[stage.needed])
            if _fails(stage, stage.version(tensors), held) is None:
                shape = list(tensors[stage.needed].shape)
                raise ConformanceError(f"{stage.needed} came as {shape}, and the version was taken")


def wrong_dtype(plugin: Plugin[Any]) -> None:
    """A tensor has another dtype: the version is refused, or its values are converted; bytes are not reinterpreted."""
    with Stage(plugin) as stage:
        held = _first(stage)
        tensors = dict(plugin.checkpoint(2))
        tensors[stage.needed] = tensors[stage.needed].to(_OTHER.get(tensors[stage.needed].dtype, torch.float32))
        version = stage.version(tensors)
        if _fails(stage, version, held) is None:
            stage.must_hold(version, "it was taken in another dtype")
        stage.push(stage.version())


def aborted_at_each_bucket(plugin: Plugin[Any]) -> None:
    """A round is given up after every number of buckets; what the engine held comes again, and is served."""
    with Stage(plugin) as stage:
        held = _first(stage)
        version = stage.version()
        count = len(version.buckets)
        for loaded in range(0, count + 1, max(1, count // _MOST_ABORTS)):
            stage.round += 1
            stage.pause()
            stage.begin(version)
            stage.load(version, range(loaded))
            stage.undo(held)
        stage.push(version)


def aborted_after_finish(plugin: Plugin[Any]) -> None:
    """A version is loaded whole, and taken back before it was served, since another engine did not take it."""
    with Stage(plugin) as stage:
        held = _first(stage)
        version = stage.version()
        stage.round += 1
        stage.pause()
        stage.begin(version)
        stage.load(version, range(len(version.buckets)))
        stage.finish()
        if not stage.give_up():
            raise ConformanceError("it holds another version than before the round, and said that nothing was touched")
        stage.push(held)
        stage.push(version)


def failed_in_the_middle(plugin: Plugin[Any]) -> None:
    """A bucket cannot be loaded, after others were; what the engine held comes again, and is served."""
    with Stage(plugin) as stage:
        held = _first(stage)
        version = stage.version()
        count = len(version.buckets)
        for broken in sorted({0, count // 2, count - 1}):
            outside = [replace(part, slot_offset=1 << 40) for part in version.buckets[broken]]
            renamed = [replace(part, name="conformance.unknown") for part in version.buckets[broken]]
            for parts in (outside, renamed):
                stage.round += 1
                stage.pause()
                stage.begin(version)
                try:
                    stage.load(version, range(count), {broken: parts})
                    stage.finish()
                except StepRefusedError:
                    stage.undo(held)
                else:
                    raise ConformanceError(f"bucket {broken} could not be loaded, and the version was taken for whole")
        stage.push(version)


def incomplete(plugin: Plugin[Any]) -> None:
    """The end of the loading is said before all buckets came: `finish` fails, and the engine is not resumed."""
    with Stage(plugin) as stage:
        held = _first(stage)
        version = stage.version()
        for left_out in range(len(version.buckets)):
            stage.round += 1
            stage.pause()
            stage.begin(version)
            loaded = [seq for seq in range(len(version.buckets)) if seq != left_out]
            try:
                stage.load(version, loaded)
            except StepRefusedError:
                pass  # that something is missing may be seen from what comes next
            else:
                stage.refused(Finish(stage.round), f"although bucket {left_out} had not come")
            stage.undo(held)
            if left_out + 1 == _MOST_ABORTS:
                break
        stage.push(version)


def other_bytes(plugin: Plugin[Any]) -> None:
    """A slot holds other bytes than were staged: `finish` fails by the fold, and what the engine held comes again."""
    with Stage(plugin) as stage:
        held = _first(stage)
        version = stage.version()
        stage.round += 1
        stage.pause()
        staged, version.fold = version.fold, version.fold ^ 1
        stage.begin(version)
        version.fold = staged
        stage.load(version, range(len(version.buckets)))
        error = stage.refused(Finish(stage.round), "although other bytes came than were staged")
        if error.error.code != "verification":
            raise ConformanceError(f"bytes were not what was staged, and it said {error}")
        stage.undo(held)
        stage.push(version)


def asked_while_serving(plugin: Plugin[Any]) -> None:
    """It is asked whether versions fit, as before their bytes are there: it says so, serves on, and changes nothing."""
    with Stage(plugin) as stage:
        held = _first(stage)
        stage.check(stage.version(), -1)
        tensors = dict(plugin.checkpoint(2))
        tensors["conformance.unknown.weight"] = tensors.pop(stage.needed)
        try:
            stage.check(stage.version(tensors), -2)
        except StepRefusedError as error:
            if error.error.code != "manifest":
                raise ConformanceError(f"a version that does not fit is refused by a ManifestError: {error}") from None
        stage.must_serve("it was only asked")
        stage.must_hold(held, "it was only asked whether another version fits")
        stage.push(stage.version())


def _first(stage: Stage) -> Version:
    """Give the engine a version to fall back on."""
    version = stage.version()
    stage.push(version)
    return version


def _fails(stage: Stage, version: Version, held: Version, *, announced: bool = True) -> StepRefusedError | None:
    """Push what may not fit; returns why it was refused, with the engine serving what it held, or None if it was not.

    Raises:
        ConformanceError: it was refused, and the engine is not what it was.
    """
    try:
        stage.push(version, announced=announced, fits=False)
    except StepRefusedError as error:
        if error.step == "check":
            stage.must_serve("it refused a version before its pause")
            stage.must_hold(held, "it refused another version before its pause")
        else:
            stage.undo(held)
        return error
    return None

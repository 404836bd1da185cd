"""Scenarios in which a version fits, and is loaded: whole, in any form, and nothing of it is kept too long."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from cpe_daemon.wire.messages import Farewell
from inference_plugins.testing.errors import ConformanceError
from inference_plugins.testing.plugin import Plugin
from inference_plugins.testing.stage import Stage
from inference_plugins.testing.version import reordered, slots_for_a_part, slots_for_all, spec_of

_VERSIONS = 3


def module_groups(plugin: Plugin[Any]) -> None:
    """Versions come one after another, their tensors in buckets that hold whole module groups."""
    with Stage(plugin) as stage:
        for _ in range(_VERSIONS):
            stage.push(stage.version())


def one_bucket(plugin: Plugin[Any]) -> None:
    """All of a version comes in one bucket."""
    with Stage(plugin, slots_for_all(_specs(plugin))) as stage:
        for _ in range(_VERSIONS):
            stage.push(stage.version())


def split_tensors(plugin: Plugin[Any]) -> None:
    """Tensors larger than a slot come in parts, in consecutive buckets."""
    slot_bytes = slots_for_a_part(_specs(plugin))
    with Stage(plugin, slot_bytes) as stage:
        for _ in range(_VERSIONS):
            version = stage.version()
            if all(part.nbytes == spec.nbytes for part, spec in _parts(version)):
                raise ConformanceError("no tensor of checkpoint() has more than 512 bytes, so that none can be split")
            stage.push(version)


def any_order(plugin: Plugin[Any]) -> None:
    """Tensors come in other orders than the checkpoint's: those of a fused parameter too, and modules' among them."""
    names = list(plugin.checkpoint(0))
    orders = [list(reversed(names)), sorted(names), random.Random(1).sample(names, len(names))]  # noqa: S311
    with Stage(plugin) as stage:
        for number, order in enumerate(orders, start=1):
            stage.push(stage.version(reordered(plugin.checkpoint(number), order)))


def views_let_go(plugin: Plugin[Any]) -> None:
    """What lay in a slot is not used any more when the bucket was acknowledged: the slot is overwritten then."""
    with Stage(plugin, slots_for_all(_specs(plugin))) as stage:
        for at_once in (False, True):
            stage.overwrites = at_once
            version = stage.version()
            stage.push(version)
            stage.overwrite()
            stage.must_hold(version, "it was loaded; it looks at the slots still: copy what `load` is given")


def same_version_again(plugin: Plugin[Any]) -> None:
    """The version that the engine holds comes again, as after a push that is asked for, and then the one before."""
    with Stage(plugin) as stage:
        first, second = stage.version(), stage.version()
        for version in (first, second, second, first):
            stage.push(version)


def content_is_told(plugin: Plugin[Any]) -> None:
    """The next daemon is told what the engine holds, and its digest; the engine serves on through the change."""
    with Stage(plugin) as stage:
        if stage.hello.content is not None or stage.hello.digest:
            raise ConformanceError(f"it was given no version, and says that it holds {stage.hello.content}")
        version = stage.version()
        stage.push(version)
        stage.daemon.say(Farewell("the scenario has another one"))
        hello = stage.await_hello()
        told = (hello.content, hello.digest, hello.touched, hello.starting)
        if told != (version.id, version.digest, False, False):
            raise ConformanceError(
                f"it holds {version} whole and has served it, and says (content, digest, touched, starting) {told}"
            )
        stage.must_serve("its daemon only said farewell")
        stage.daemon.welcome()
        stage.open_slots()
        stage.must_hold(version)
        stage.push(stage.version())


def _specs(plugin: Plugin[Any]) -> list[Any]:
    tensors: Mapping[str, torch.Tensor] = plugin.checkpoint(0)
    return [spec_of(name, tensor) for name, tensor in tensors.items()]


def _parts(version: Any) -> list[tuple[Any, Any]]:
    specs = {spec.name: spec for spec in version.specs}
    return [(part, specs[part.name]) for bucket in version.buckets for part in bucket]

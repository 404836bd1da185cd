"""torch's plugin does what is promised to the daemon: the kit's scenarios, with a module, a slice, and a callback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from inference_plugins.testing import SCENARIOS, Plugin, Scenario, Tensors, check
from inference_plugins.torch import Attachment, attach

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


@dataclass
class Engine:
    held: dict[str, torch.Tensor]
    attachment: Attachment


def checkpoint(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in Model().state_dict().items()
        if tensor.is_floating_point()
    }
    return {**made, "steps": torch.tensor(seed)}


def wake_up(engine: Engine, kept: bool) -> None:
    if not kept:
        for tensor in engine.held.values():
            tensor.zero_()
    engine.attachment.wake_up(kept=kept)


def plugin(**changes: Any) -> Plugin[Engine]:
    def make(endpoint: str) -> Engine:
        model = Model()
        return Engine(model.state_dict(), attach(model, engine="e", socket=endpoint, connect_timeout=20))

    told: dict[str, Any] = {
        "make": make,
        "close": lambda engine: engine.attachment.close(),
        "weights": lambda engine: engine.held,
        "serving": lambda engine: engine.attachment.serving,
        "checkpoint": checkpoint,
        "forward": lambda engine: engine.attachment.lock,
        "sleep": lambda engine: engine.attachment.sleep(),
        "wake_up": wake_up,
    }
    return Plugin(**told | changes)


def sliced() -> Plugin[Engine]:
    """One of two ranks: its part of a tensor is a run of bytes of some, and none of others."""
    rule = {"layers.0.qkv.weight": 0, "layers.1.qkv.weight": 1, "embed.weight": -1}

    def part(tensors: Tensors) -> Tensors:
        return {n: t.chunk(2, rule[n])[1].clone() if n in rule else t.clone() for n, t in tensors.items()}

    def make(endpoint: str) -> Engine:
        held = dict(part(Model().state_dict()))
        attachment = attach(held, engine="e", rank=1, world_size=2, slicing=rule, socket=endpoint, connect_timeout=20)
        return Engine(held, attachment)

    return plugin(make=make, weights=lambda engine: engine.held, expected=part)


def callback() -> Plugin[Engine]:
    """A function that is given views, and takes whatever comes."""

    def make(endpoint: str) -> Engine:
        held = {name: tensor.clone() for name, tensor in Model().state_dict().items()}

        def take(name: str, tensor: torch.Tensor) -> None:
            if name not in held:
                raise KeyError(name)
            held[name].copy_(tensor)

        return Engine(held, attach(take, engine="e", socket=endpoint, connect_timeout=20))

    return plugin(make=make, weights=lambda engine: engine.held)


WHOLE = [scenario for scenario in SCENARIOS if scenario.name not in ("tensor_missing", "wrong_shape")]
"""A function cannot say which tensors it would miss: it is given what there is."""


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_torch_module_conforms(scenario: Scenario) -> None:
    assert scenario.run(plugin()) == ""


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_torch_slice_conforms(scenario: Scenario) -> None:
    assert scenario.run(sliced()) == ""


@pytest.mark.parametrize("scenario", WHOLE, ids=str)
def test_torch_callback_conforms(scenario: Scenario) -> None:
    assert scenario.run(callback()) == ""


def test_torch_engine_leaves_nothing(no_leaks: None) -> None:
    assert check(plugin(), only=("split_tensors", "daemon_lost")) == {"split_tensors": "", "daemon_lost": ""}

"""An engine worker: attaches a target to the daemon, and tells what it holds. Commands come over its `Console`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpe_daemon.devices.cuda.slots import gpu_uuid
from inference_plugins.torch import Attachment, attach
from tests.integration import weights
from tests.integration.collective import Collective
from tests.integration.console import Console
from tests.integration.gpus import break_context


class TiedModule(torch.nn.Module):
    """Two names for one parameter, a buffer, and one that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 16)
        self.head = torch.nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("positions", torch.arange(40), persistent=False)


class GatedStore:
    """A callback that keeps what it is given, with the gate before every tensor.

    Attributes:
        places: where it keeps that.
        failing_in: tensors that it takes before it fails; 0: it does not.
        called: how often it was called.
    """

    def __init__(self, console: Console, places: dict[str, Tensor]) -> None:
        self.places = places
        self.failing_in = self.called = 0
        self._console = console

    def __call__(self, name: str, tensor: Tensor) -> None:
        self._console.gate.pass_by()
        self.called += 1
        self.failing_in = max(self.failing_in - 1, 0)
        if self.failing_in == 1:
            raise ValueError("the engine cannot")
        self.places[name].copy_(tensor)


class Engine(NamedTuple):
    """What is attached, a function for the tensors in it by name, and what it computes if it is a real model."""

    target: Any
    held: Callable[[], Mapping[str, Tensor]]
    embed: Callable[[list[str]], list[list[float]]] | None = None


def make_engine(kind: str, console: Console, arguments: dict[str, Any]) -> Engine:
    """Make an engine with weights to begin with: random ones in a real model, the same ones or zeros in others."""
    if kind == "minilm":
        embedder = importlib.import_module("tests.integration.minilm").Embedder(real=False)
        return Engine(embedder.model, embedder.model.state_dict, embedder.embed)
    if kind == "module":
        torch.manual_seed(0)
        module = TiedModule()
        return Engine(module, module.state_dict)
    slices = (arguments["rank"], arguments["world_size"]) if "slicing" in arguments else (0, 1)
    places = weights.blank(weights.specs(arguments["recipe"]), *slices)
    if "device" in arguments:
        places = {name: tensor.to(arguments["device"]) for name, tensor in places.items()}
    return Engine(GatedStore(console, places) if kind in {"callback", "learned"} else places, lambda: places)


class Worker:
    """What the verbs of the console act upon."""

    def __init__(self, engine: Engine, terms: dict[str, Any]) -> None:
        self._engine = engine
        self._terms = terms
        self._attachment: Attachment | None = None
        self._collective: Collective | None = None

    @property
    def attachment(self) -> Attachment:
        if self._attachment is None:
            raise RuntimeError("not attached")
        return self._attachment

    def attach(self) -> None:
        self._attachment = attach(self._engine.target, **self._terms)

    def ready(self, timeout: float) -> None:
        self.attachment.ready(timeout)

    def state(self) -> dict[str, Any]:
        attachment = self.attachment
        return {
            "version": str(attachment.version) if attachment.version else None,
            "serving": attachment.serving,
            "why": attachment.lock.shut_because,
        }

    def loading(self) -> dict[str, int]:
        """How it loads, if that is learned, and how often the function was called."""
        report = self.attachment.learned
        called = self._engine.target.called
        return {
            "learned": report.learned,
            "unproven": report.unproven,
            "kept": sum(report.kept.values()),
            "called": called,
        }

    def relearn(self) -> None:
        self.attachment.relearn()

    def move(self) -> None:
        """Give every tensor other memory."""
        places = self._engine.target.places
        places.update({name: tensor.clone() for name, tensor in places.items()})

    def fail(self, at: int) -> None:
        """Have the function fail when it is called for the ``at``-th time from now on."""
        self._engine.target.failing_in = at + 1

    def digests(self) -> dict[str, str]:
        """Of what it holds at this moment, whether it serves or not."""
        return weights.digests(self._engine.held())

    def forward(self, timeout: float = 0.0) -> dict[str, str]:
        """Serve: `digests`, but under the lock."""
        self.attachment.lock.acquire(timeout)
        try:
            return self.digests()
        finally:
            self.attachment.lock.release()

    def embed(self, sentences: list[str]) -> list[list[float]]:
        """Serve: what a real model computes, under the lock."""
        if self._engine.embed is None:
            raise RuntimeError("this engine computes nothing")
        with self.attachment.lock:
            return self._engine.embed(sentences)

    def acquire(self, timeout: float = 5.0) -> None:
        self.attachment.lock.acquire(timeout)

    def release(self) -> None:
        self.attachment.lock.release()

    def serve_together(self, path: str, rank: int, world_size: int) -> None:
        """Serve in the background, with the engine's other workers in every forward pass."""
        self._collective = Collective(self.attachment, self._engine.held)
        self._collective.start(path, rank, world_size)

    def served(self) -> dict[str, Any]:
        return self._collective.served() if self._collective else {}

    def stop_serving(self) -> dict[str, Any]:
        return self._collective.stop() if self._collective else {}

    def sleep(self, timeout: float = 10.0) -> None:
        """Lend the memory to others, who leave nothing of what was in it."""
        self.attachment.sleep(timeout)
        self.lose_weights()

    def lose_weights(self) -> None:
        for tensor in self._engine.held().values():
            tensor.view(-1).view(torch.uint8).fill_(0xAB)

    def wake_up(self, kept: bool = False) -> None:
        self.attachment.wake_up(kept=kept)

    def break_context(self) -> None:
        """Have the GPU fail this process."""
        tensor, *_ = self._engine.held().values()
        break_context(tensor.device.index)

    def close(self) -> None:
        self.attachment.close()


def main(arguments: dict[str, Any]) -> None:
    console = Console()
    target = arguments.pop("target")
    engine = make_engine(target, console, arguments)
    if target == "learned":
        arguments["writes_to"] = engine.target.places
    arguments.pop("recipe", None)
    if device := arguments.pop("device", None):
        arguments["gpu"] = gpu_uuid(torch.device(device).index)
    if arguments.pop("on_wake", None):
        arguments["on_wake"] = lambda: console.tell("woken")
    if arguments.pop("slicing", None):
        arguments["slicing"] = weights.slicing
    worker = Worker(engine, arguments)
    verbs: list[Callable[..., object]] = [
        worker.attach,
        worker.ready,
        worker.state,
        worker.loading,
        worker.relearn,
        worker.move,
        worker.fail,
        worker.digests,
        worker.forward,
        worker.embed,
        worker.acquire,
        worker.release,
        worker.serve_together,
        worker.served,
        worker.stop_serving,
        worker.sleep,
        worker.lose_weights,
        worker.wake_up,
        worker.break_context,
        worker.close,
    ]
    console.serve({verb.__name__: verb for verb in verbs})

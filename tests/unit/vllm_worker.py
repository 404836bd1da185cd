"""A vLLM worker that learns its loaders, over a stand-in for the layerwise reload."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from inference_plugins.gate import Gate
from inference_plugins.learned import LearnedLoading, tensors_of
from inference_plugins.vllm.benches import ModelBenches
from inference_plugins.vllm.loader import VllmLoader
from inference_plugins.vllm.reload import Reload
from tests.unit.fake_layerwise import HIDDEN, FakeLayerwise, Model
from tests.unit.gated_worker import CPU, GatedWorker


class Padless(Model):
    """Its embedding has as many rows as the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.weight = torch.nn.Parameter(torch.zeros(2, HIDDEN), requires_grad=False)


def checkpoint(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    rows = {"embed": 2, "q": HIDDEN, "k": HIDDEN, "v": HIDDEN, "norm": 1}
    return {name: torch.randn(count, HIDDEN, generator=generator) for name, count in rows.items()}


class Worker(GatedWorker):
    """With vLLM's own thread in the gate."""

    def __init__(self, threads: ThreadPoolExecutor, *, learns: bool = True, model: Model | None = None) -> None:
        self.model = model or Padless()
        self.layerwise = FakeLayerwise()
        self.benches = ModelBenches(self.model, self.layerwise.functions)
        self.learned = LearnedLoading(lambda: tensors_of(self.model), on=learns, benches=self.benches)
        spared = lambda: self.learned.modules  # noqa: E731  # as the worker has it
        functions = self.layerwise.functions
        self.reload = Reload(self.model, "config", functions, spared=spared, benches=self.benches)
        gate = Gate("vLLM")
        loader = VllmLoader(lambda: [self.reload], CPU, gate, needs_version=False, learned=self.learned)
        super().__init__(loader, gate, threads)

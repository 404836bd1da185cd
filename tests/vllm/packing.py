"""A vLLM in one process that takes versions by its loaders, and by copies: says after each what it holds.

Run by vLLM's interpreter: ``python -m tests.vllm.packing DIRECTORY...``, of checkpoints of one model. Whatever this CPU
has kernels for, linear layers are packed too, into memory of their own, and let their weights go.
"""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inference_plugins.gate import Gate
from inference_plugins.learned import LearnedLoading, tensors_of
from inference_plugins.vllm.benches import ModelBenches
from inference_plugins.vllm.compat import layerwise, pack_experts_again
from inference_plugins.vllm.loader import VllmLoader
from inference_plugins.vllm.parts import Target
from inference_plugins.vllm.reload import Reload
from tests.unit.gated_worker import CPU, GatedWorker

ROUNDS = 6


def pack(layer: Any, remove_weight: bool) -> None:
    """In place of vLLM's own choice of a kernel."""
    if layer.weight.is_meta or layer.weight.ndim != 2:
        layer.cpu_linear = torch.nn.functional.linear
        return
    layer.packed = layer.weight.t().contiguous()
    layer.cpu_linear = lambda x, _, bias: x @ layer.packed if bias is None else x @ layer.packed + bias
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.packed.dtype), requires_grad=False)


def digest(model: torch.nn.Module) -> str:
    """Of all parameters, and of what was packed."""
    found = tensors_of(model)
    found |= {name: module.packed for name, module in model.named_modules() if hasattr(module, "packed")}
    hashed = hashlib.sha256()
    for name in sorted(found):
        hashed.update(name.encode())
        hashed.update(found[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def worker_of(worker: Any, threads: ThreadPoolExecutor, *, learns: bool) -> tuple[GatedWorker, LearnedLoading]:
    """One that takes versions tensor by tensor, as ours does."""
    model, functions, gate = worker.get_model(), layerwise(), Gate("vLLM")
    benches = ModelBenches(model, functions)
    learned = LearnedLoading(lambda: tensors_of(model), on=learns, benches=benches)
    config = worker.vllm_config.model_config
    reload = Reload(model, config, functions, spared=lambda: learned.modules, benches=benches)
    loader = VllmLoader(lambda: [Target(reload)], CPU, gate, needs_version=False, learned=learned)
    return GatedWorker(loader, gate, threads), learned


def main(directories: list[str]) -> None:
    import vllm.model_executor.layers.utils as chosen
    from vllm import LLM, SamplingParams
    from vllm.config import set_current_vllm_config

    chosen.dispatch_cpu_unquantized_gemm = pack
    versions = [load_file(Path(directory) / "model.safetensors") for directory in directories]
    arguments = {"dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True}
    llm: Any = LLM(model=directories[0], **arguments)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    pack_experts_again(worker.get_model())
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with ThreadPoolExecutor(1) as threads, set_current_vllm_config(worker.vllm_config):
        for learns in (False, True):
            taking, learned = worker_of(worker, threads, learns=learns)
            held = []
            for number in range(1, ROUNDS + 1):
                if not taking.push(number, versions[number % len(versions)]):
                    raise RuntimeError(taking.failure)
                (output,) = llm.generate({"prompt_token_ids": [5, 6, 7, 8]}, sampling, use_tqdm=False)
                held.append([digest(worker.get_model()), list(output.outputs[0].token_ids)])
            report = learned.report
            said = {"learned": report.learned, "made_over": report.made_over, "kept": dict(report.kept)}
            print("@" + json.dumps({"held": held, "given": taking.given, **said}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

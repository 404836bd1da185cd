"""What is used of vLLM's insides is in the sources of each version that is let in, as far as they are here.

Those of `.venv-vllm` are read, and of the directories in ``CPE_VLLM_SOURCES``, each of which has a ``vllm`` in it, as a
wheel that was unpacked has. Nothing is imported: a wheel for GPUs would not be.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PLACES = [str(place) for place in (ROOT / ".venv-vllm/lib").glob("python3.*/site-packages")]
PLACES += os.environ.get("CPE_VLLM_SOURCES", "").split(":")
SOURCES = [Path(place) / "vllm" for place in PLACES if place and (Path(place) / "vllm").is_dir()]

USED = {
    "distributed/weight_transfer/factory.py": ["WeightTransferEngineFactory", "_registry", "register_engine"],
    "distributed/weight_transfer/base.py": [
        "WeightTransferInitInfo",
        "WeightTransferUpdateInfo",
        "WeightTransferEngine.__init__(self, config, vllm_config, device, model)",
        "WeightTransferEngine.init_transfer_engine(self, init_info)",
        "WeightTransferEngine.start_weight_update(self)",
        "WeightTransferEngine.update_weights(self, update_info)",
        "WeightTransferEngine.finish_weight_update(self)",
        "WeightTransferEngine.reset_weight_update_target(self)",
        "WeightTransferEngine.parse_update_info(self, update_dict)",
        "_default_model",
        "_default_model_config",
    ],
    "v1/worker/gpu_worker.py": [
        "Worker.start_weight_update(self)",
        "Worker.start_draft_weight_update(self)",
        "_weight_update_active",
        "weight_transfer_engine",
        "create_engine",
    ],
    "v1/worker/gpu_model_runner.py": ["GPUModelRunner.get_draft_model(self)"],
    "v1/worker/gpu/model_runner.py": ["GPUModelRunner.get_draft_model(self)"],
    "config/speculative.py": ["draft_model_config"],
    "config/parallel.py": ["enable_eplb", "enable_elastic_ep", "all2all_backend", "data_parallel_rank", "world_size"],
    "config/load.py": ["download_dir"],
    "model_executor/model_loader/weight_utils.py": ["default_weight_loader(param, loaded_weight)"],
    "model_executor/models/deepseek_mtp.py": ["is_mtp_completeness_check_enabled|num_mtp_layers"],
    "model_executor/model_loader/reload/layerwise.py": [
        "initialize_layerwise_reload(model)",
        "finalize_layerwise_reload()",
        "get_layerwise_info(layer)",
        "_place_kernel_tensors(layer, info)",
        "_layerwise_process(layer, info)",
        "materialize_layer",
        "QuantizeMethodBase",
        "_original_do_torchao_reload",
        "is_deferred_attention_layer|MLAAttention",
    ],
    "model_executor/model_loader/reload/meta.py": ["SKIP_LOAD_TENSORS|SKIP_TENSORS", "materialize_layer(layer, info)"],
    "model_executor/model_loader/reload/types.py": [
        "LayerReloadingInfo.reset(self)",
        "LayerReloadingInfo.can_load(self)",
        "restore_metadata",
        "load_numel",
        "load_numel_total",
        "loaded_weights",
        "kernel_tensors",
        "kernel_non_persistent_buffers",
    ],
    "model_executor/layers/fused_moe/fused_moe_method_base.py": ["moe_kernel"],
    "model_executor/layers/fused_moe/unquantized_fused_moe_method.py": [
        "UnquantizedFusedMoEMethod.process_weights_after_loading(self, layer)",
        "fused_experts|cpu_fused_moe",
    ],
    "model_executor/layers/vocab_parallel_embedding.py": ["org_vocab_start_index", "org_vocab_end_index"],
}
"""By file: names that are defined, set or read in it; functions with their parameters. ``|``: one of them is."""


@pytest.mark.skipif(not SOURCES, reason="no sources of vLLM are here: `make test-vllm` gets some")
@pytest.mark.parametrize("path", USED)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_vllm_has_what_is_used_of_it(source: Path, path: str) -> None:
    found = names(ast.parse((source / path).read_text()))
    missing = [name for name in USED[path] if not found.intersection(name.split("|"))]
    assert not missing


def names(tree: ast.AST, within: str = "") -> set[str]:
    """All that a file defines, sets or reads, and its functions with their parameters."""
    found = set[str]()
    for node in ast.iter_child_nodes(tree):
        inner = within
        match node:
            case ast.ClassDef():
                found.add(node.name)
                inner = f"{node.name}."
            case ast.FunctionDef():
                found |= {node.name, f"{within}{node.name}({', '.join(one.arg for one in node.args.args)})"}
            case ast.Name():
                found.add(node.id)
            case ast.Attribute():
                found.add(node.attr)
            case ast.Constant(value=str(text)) if text.isidentifier():
                found.add(text)
            case ast.alias():
                found.add(node.name)
        found |= names(node, inner)
    return found

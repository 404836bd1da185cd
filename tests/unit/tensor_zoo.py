"""Tensors of every kind that can be published, and their bytes found by another way than the publisher's."""

from __future__ import annotations

import torch
from torch import Tensor

from cpe_daemon.core.dtypes import ITEMSIZE

DTYPES = [name for name in ITEMSIZE if hasattr(torch, name)]


def tensor_of(dtype: str, *shape: int, seed: int = 0) -> Tensor:
    """A tensor of random bits."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel()
    high = 2 if dtype == "bool" else 256
    bits = torch.randint(0, high, (count * ITEMSIZE[dtype],), dtype=torch.uint8, generator=generator)
    return bits.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values, contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.reshape(-1)  # copies what is not contiguous
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def zoo() -> dict[str, Tensor]:
    """One of everything, in an order that leaves gaps of many sizes."""
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    tensors = {f"dtype.{name}": tensor_of(name, 3, 5, seed=at) for at, name in enumerate(DTYPES)}
    return tensors | {
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "expanded": torch.tensor([1.5, 2.5]).expand(7, 2),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "grad": torch.randn(9, 9, requires_grad=True),
        "parameter": torch.nn.Parameter(base.clone()[:, 3:9]),
        "conjugated": torch.randn(11, dtype=torch.complex64).conj(),
        "negated": torch.randn(13, dtype=torch.complex64).conj().imag,
        "large": tensor_of("bfloat16", 100, 257, seed=99),
        "one_byte": torch.tensor([True]),
    }

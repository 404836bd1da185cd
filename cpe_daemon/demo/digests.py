"""Digests of tensors' bytes: what the trainer expects an engine to hold, and what it holds."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from xxhash import xxh3_128_hexdigest


def digest_of(tensor: torch.Tensor) -> str:
    """xxh3_128 of a tensor's values in row-major order; copies it if it is not contiguous."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return xxh3_128_hexdigest((ctypes.c_char * flat.numel()).from_address(flat.data_ptr()))


def digests_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """The digest of each tensor by its name."""
    return {name: digest_of(tensor) for name, tensor in tensors}

"""What a trainer may publish, and how it becomes an ordered list of plain tensors with their shards.

A source is a mapping from name to tensor, pairs of (name, tensor), an ``nn.Module``, or a path of safetensors. Only an
iterator has to be copied while it is consumed, for its size is not known before its end: `Pairs`. Everything else is
held by reference, and its bytes are read once, straight into where they travel from: `Contribution`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from cpe_daemon.core.dtypes import ITEMSIZE
from cpe_daemon.core.manifest import Layout, layout
from cpe_daemon.core.types import Shard
from cpe_daemon.errors import ManifestError
from cpe_daemon.publisher.files import read_safetensors

Source: TypeAlias = "Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | torch.nn.Module | str | os.PathLike[str]"
"""What `Publisher.publish` takes. A ``str`` is a path."""

_DTYPES: Final = {getattr(torch, name): name for name in ITEMSIZE if hasattr(torch, name)}
_PLAIN: Final = frozenset({Tensor, torch.nn.Parameter})
"""Types that need no look at what kind of subclass they are: there may be a hundred thousand tensors."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One rank's shards, where they lie in its extent, and the tensors that hold their bytes, in the same order."""

    shards: list[Shard]
    layout: Layout
    tensors: list[Tensor]

    @classmethod
    def of(cls, pairs: Iterable[tuple[object, object]]) -> Contribution:
        """Check every pair of name and tensor, and lay them out.

        Raises:
            ManifestError: a name comes twice, or something is not a tensor that can be published; names it.
        """
        names: set[str] = set()
        shards: list[Shard] = []
        tensors: list[Tensor] = []
        for name, value in pairs:
            tensor = publishable(name, value)
            shard = shard_of(str(name), tensor)
            if shard.name in names:
                raise ManifestError(f"tensor {shard.name} is given twice")
            names.add(shard.name)
            shards.append(shard)
            tensors.append(tensor)
        return cls(shards, layout(shards), tensors)


class Pairs:
    """An iterator of (name, tensor): each tensor lives until the next is asked for, so it is copied at once."""

    def __init__(self, pairs: Iterator[object]) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield checked pairs.

        Raises:
            ManifestError: a name comes twice, or something is not a tensor that can be published; names it.
        """
        names: set[str] = set()
        for entry in self._pairs:
            name, value = _pair(entry)
            tensor = publishable(name, value)
            if str(name) in names:
                raise ManifestError(f"tensor {name} is given twice")
            names.add(str(name))
            yield str(name), tensor


def open_source(source: Source) -> Contribution | Pairs:
    """Find out what ``source`` is.

    A module contributes its ``state_dict()``: parameters and persistent buffers, and a tied weight under each of its
    names. A path is a ``.safetensors`` file or a directory of them, read lazily.

    Raises:
        ManifestError: it is nothing that can be published, or contradicts itself; names the tensor or the file.
    """
    if isinstance(source, torch.nn.Module):
        return Contribution.of(source.state_dict().items())
    if isinstance(source, str | os.PathLike):
        return Contribution.of(read_safetensors(Path(source)))
    if isinstance(source, Mapping):
        return Contribution.of(source.items())
    if isinstance(source, list | tuple):
        return Contribution.of(_pair(entry) for entry in source)
    if isinstance(source, Iterable):  # a tensor is one too: of things that are no pairs
        return Pairs(iter(source))
    raise ManifestError(
        f"a {type(source).__name__} cannot be published: give a mapping, pairs of name and tensor, an nn.Module,"
        " or a path of safetensors"
    )


def shard_of(name: str, tensor: Tensor) -> Shard:
    """Describe a whole tensor."""
    return Shard(name, _DTYPES[tensor.dtype], tuple(tensor.shape))


def publishable(name: object, value: object) -> Tensor:
    """Return ``value`` if it is a tensor whose bytes can be published as they are.

    Raises:
        ManifestError: says what it is instead, and what to do.
    """
    if not isinstance(name, str):
        raise ManifestError(f"a tensor's name must be a str, not {name!r}")
    if not isinstance(value, Tensor):
        raise ManifestError(f"{name} is not a tensor but a {type(value).__name__}")
    if type(value) not in _PLAIN:
        _check_subclass(name, value)
    if value.is_meta:
        raise ManifestError(f"tensor {name} is on the meta device: it has no bytes")
    if value.layout is not torch.strided or value.is_nested:
        raise ManifestError(f"tensor {name} is {value.layout}, not dense: publish its to_dense()")
    if value.is_quantized:
        raise ManifestError(f"tensor {name} is a quantised tensor: publish its int_repr() and its scales")
    if value.dtype not in _DTYPES:
        raise ManifestError(f"tensor {name} has the dtype {value.dtype}, which is not supported")
    return value


def _check_subclass(name: str, tensor: Tensor) -> None:
    """Refuse what only looks like a tensor with bytes of its own."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        kind = type(tensor).__name__
        advice = "publish its full_tensor()" if kind == "DTensor" else "give a plain tensor"
        raise ManifestError(f"tensor {name} is a {kind}, which is not supported: {advice}")
    if torch.nn.parameter.is_lazy(tensor):
        raise ManifestError(f"tensor {name} is not initialised: run the module once before publishing it")


def _pair(entry: object) -> tuple[object, object]:
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise ManifestError(f"expected pairs of name and tensor, found a {type(entry).__name__}")
    return entry[0], entry[1]

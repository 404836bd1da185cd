"""Which elements of a model's parameters a loader has written, whatever way it took.

SGLang's loaders pass over names that they do not know, and over parts that never come, without a word. So parameters
are filled with a mark before a version is loaded, and are searched for it afterwards: what still has it was not loaded.
The mark is a NaN, so that a model that is not whole cannot be taken for one that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

import torch

_MARK: Final = 0x7FFF7FFF7FFF7FFF
"""NaN in each floating-point type, and as one word of 8 bytes nothing that quantised weights hold."""
_WORDS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE: Final = 1 << 25
"""Words that are compared at once: a flag is made for each."""
_NONE: Final[Mapping[str, torch.Tensor]] = MappingProxyType({})
_SMALL: Final = 1 << 22
"""Elements of a parameter that may be kept aside."""


class Marks:
    """The marks in one model's parameters.

    Args:
        parameters: by name. Those that are bool, or have no memory, are passed over.
        defaults: what elements of some parameters are where nothing is written, as `defaults` gave them.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, torch.Tensor]], defaults: Mapping[str, torch.Tensor] = _NONE
    ) -> None:
        self._words = {name: words for name, tensor in parameters if (words := _words_of(tensor.data)) is not None}
        self._defaults = {
            name: values
            for name, values in defaults.items()
            if (words := self._words.get(name)) is not None
            and (words.shape, words.dtype) == (values.shape, values.dtype)
        }

    @classmethod
    def keeping_small(cls, parameters: Iterable[tuple[str, torch.Tensor]]) -> Marks:
        """Only of parameters of a few million elements at the most; what they are now are their defaults."""
        made = cls((name, tensor) for name, tensor in parameters if tensor.numel() <= _SMALL)
        made._defaults = {name: words.clone() for name, words in made._words.items()}
        return made

    def defaults(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Those of some parameters, as far as there are any."""
        return {name: self._defaults[name] for name in names if name in self._defaults}

    def set(self) -> None:
        """Fill all parameters with the mark."""
        for words in self._words.values():
            words.fill_(_mark_of(words.dtype))

    def left(self) -> Mapping[str, tuple[int, int]]:
        """Parameters that still have it: in how many elements (or words of 8 bytes), of how many there are."""
        counted = {name: torch.stack(list(_counts(words))).sum() for name, words in self._words.items()}
        found = dict(zip(counted, torch.stack(list(counted.values())).tolist(), strict=True)) if counted else {}
        return {name: (count, self._words[name].numel()) for name, count in found.items() if count}

    def restore(self) -> None:
        """Give parameters their defaults, where the mark is left."""
        for name, values in self._defaults.items():
            words = self._words[name]
            words.copy_(torch.where(words == _mark_of(words.dtype), values, words))


def _words_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """A parameter's memory, seen as integers.

    Floating-point elements are compared one by one: no finite one is the mark. Others may be anything, so that only
    words of 8 bytes tell; where there are none of these, nothing does.
    """
    if tensor.is_meta or tensor.dtype == torch.bool or not tensor.numel():
        return None
    word = _WORDS.get(tensor.element_size())
    if tensor.is_floating_point() and word is not None:
        return tensor.view(word)
    nbytes = tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or nbytes % 8 or tensor.data_ptr() % 8:
        return None
    return tensor.view(-1).view(torch.uint8).view(torch.int64)


def _mark_of(dtype: torch.dtype) -> int:
    return _MARK >> (64 - 8 * dtype.itemsize)


def _counts(words: torch.Tensor) -> Iterator[torch.Tensor]:
    """How many words have the mark, piece by piece."""
    mark = _mark_of(words.dtype)
    if not words.dim() or words.numel() <= _PIECE:
        yield (words == mark).sum()
        return
    rows = max(1, _PIECE * words.shape[0] // words.numel())
    for piece in words.split(rows):
        yield (piece == mark).sum()

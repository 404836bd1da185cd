"""What there is to know of the rows of some parts of tensors before they are folded on a device; see `core.fold`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpe_daemon.core.fold import ROW_BYTES, STEP, seed


class Rows(NamedTuple):
    """The rows of several parts, one part's after the other's; int64 ``[parts]``, on the CPU, but for the first.

    Attributes:
        total: how many.
        counts: of each part.
        keys: what is added to the sum of a row of each part, for row 0 of all.
        tails: bytes of each part's last row, if it is not full; or 0.
    """

    total: int
    counts: torch.Tensor
    keys: torch.Tensor
    tails: torch.Tensor

    @property
    def starts(self) -> torch.Tensor:
        """The first row of each part, and behind them the number of rows; int64 ``[parts + 1]``."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])

    @property
    def begins(self) -> torch.Tensor:
        """The first row of each part."""
        return self.starts[:-1]

    @classmethod
    def of(cls, names: Sequence[str], first_rows: Sequence[int], sizes: Sequence[int]) -> Rows:
        """Find it out.

        Args:
            names: of each part's tensor.
            first_rows: of the tensor, with which the part begins.
            sizes: bytes of each part.
        """
        seeds = torch.tensor([signed(seed(name)) for name in names], dtype=torch.int64)
        nbytes = torch.tensor(sizes, dtype=torch.int64)
        counts = (nbytes + ROW_BYTES - 1) // ROW_BYTES
        begins = counts.cumsum(0) - counts
        keys = (seeds + torch.tensor(first_rows, dtype=torch.int64) - begins) * signed(STEP)
        return cls(int(counts.sum()), counts, keys, nbytes % ROW_BYTES)


def signed(value: int) -> int:
    """The same 64 bits as torch has them."""
    return value - (1 << 64) if value >> 63 else value

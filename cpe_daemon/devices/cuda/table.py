"""A bucket's copies within a GPU's memory as one launch: a kernel that goes by a table of rectangles.

To issue a copy costs more than to make it, where tensors are small: 140,000 of them take as long as their bytes do in
this way, and seventy times as long one by one.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.devices.cuda.kernels import Arguments, Kernel

_THREADS: Final = 256
_BLOCK_BYTES: Final = 64 << 10
"""What one block of threads copies."""
_MOST_WORDS: Final = 1 << 30
"""Of one entry: the kernel counts them in 32 bits."""
_WIDEST: Final = 4
"""Words have 16 bytes, ``1 << _WIDEST``, where everything is aligned to that."""
_FIELDS: Final = 8
_BASE_AT: Final = 2
"""Which argument is the slot's address."""

SOURCE: Final = f"""
typedef unsigned long long u64;
struct Entry {{ u64 to, from, width, to_pitch, from_pitch, words, first, unit; }};

template <class Word> __device__ __forceinline__ void move(const Entry& entry, u64 base, unsigned block)
{{
  Word* to = (Word*)entry.to;
  const Word* from = (const Word*)(base + entry.from);
  const unsigned words = (unsigned)entry.words, width = (unsigned)entry.width;
  const unsigned each = {_BLOCK_BYTES}u / sizeof(Word), begin = block * each;
  const unsigned end = words - begin < each ? words : begin + each;
  if (width == words) {{
    for (unsigned at = begin + threadIdx.x; at < end; at += 4 * {_THREADS}u) {{
      Word word[4];
      #pragma unroll
      for (unsigned k = 0; k < 4; ++k)
        if (at + k * {_THREADS}u < end) word[k] = from[at + k * {_THREADS}u];
      #pragma unroll
      for (unsigned k = 0; k < 4; ++k)
        if (at + k * {_THREADS}u < end) to[at + k * {_THREADS}u] = word[k];
    }}
  }} else {{
    for (unsigned at = begin + threadIdx.x; at < end; at += 4 * {_THREADS}u) {{
      Word word[4];
      u64 place[4];
      #pragma unroll
      for (unsigned k = 0; k < 4; ++k) {{
        const unsigned index = at + k * {_THREADS}u, row = index / width, column = index - row * width;
        place[k] = row * entry.to_pitch + column;
        if (index < end) word[k] = from[row * entry.from_pitch + column];
      }}
      #pragma unroll
      for (unsigned k = 0; k < 4; ++k)
        if (at + k * {_THREADS}u < end) to[place[k]] = word[k];
    }}
  }}
}}

// A block of threads for each 64 KiB of an entry: which entry that is, `owners` says.
extern "C" __global__ void __launch_bounds__({_THREADS}) copy_table(
    const Entry* __restrict__ table, const int* __restrict__ owners, u64 base)
{{
  const Entry entry = table[owners[blockIdx.x]];
  const unsigned block = blockIdx.x - (unsigned)entry.first;
  switch (entry.unit) {{
    case 4: move<uint4>(entry, base, block); break;
    case 3: move<u64>(entry, base, block); break;
    case 2: move<unsigned>(entry, base, block); break;
    case 1: move<unsigned short>(entry, base, block); break;
    default: move<unsigned char>(entry, base, block);
  }}
}}
"""
"""CUDA C; ``move`` copies what is left of an entry, or 64 KiB of it, in words of one size."""


class Tables:
    """The kernel on one GPU; makes tables for it. Belongs to the worker's thread.

    Args:
        index: torch's of the GPU, the thread's current one.

    Raises:
        ResourceError: it cannot be compiled here.
    """

    def __init__(self, index: int) -> None:
        self._kernel = Kernel(SOURCE, "copy_table", index)
        self._device = torch.device("cuda", index)
        with torch.cuda.device(index):  # once, for a kernel's first launch takes long
            scratch = torch.empty(2, dtype=torch.uint8, device=self._device)
            here = scratch.data_ptr()
            self.make([Rectangle(here + 1, here, 1)]).copy(0, torch.cuda.current_stream().cuda_stream)
            torch.cuda.current_stream().synchronize()

    def make(self, rectangles: Sequence[Rectangle]) -> Table:
        """Bring rectangles to the GPU, on torch's current stream; their sources count from a slot's beginning."""
        entries, owners = described(rectangles)
        # Not from page-locked memory: to take that may cost milliseconds, and these are some kilobytes.
        return Table(self._kernel, entries.to(self._device), owners.to(self._device))


class Table:
    """Copies that are ready to be issued, any number of times, on the stream that it was made on."""

    def __init__(self, kernel: Kernel, entries: torch.Tensor, owners: torch.Tensor) -> None:
        self._kernel = kernel
        self._kept = entries, owners
        self._blocks = len(owners)
        self._arguments = Arguments([entries.data_ptr(), owners.data_ptr(), 0])

    def copy(self, base: int, stream: int) -> None:
        """Issue them all, out of the slot at ``base``, which is a multiple of 16."""
        if self._blocks:
            self._arguments[_BASE_AT] = base
            self._kernel.launch(self._blocks, _THREADS, self._arguments, stream)


def described(rectangles: Sequence[Rectangle]) -> tuple[torch.Tensor, torch.Tensor]:
    """Describe rectangles as the kernel reads them.

    Returns:
        int64 ``[entries, 8]``, all but addresses in words; and int32 ``[blocks]``, the entry of each block of threads.
    """
    flat = array("q", itertools.chain.from_iterable(_small(rectangles)))
    if not flat:
        return torch.empty((0, _FIELDS), dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    destination, source, nbytes, rows, to_pitch, from_pitch = torch.frombuffer(flat, dtype=torch.int64).view(-1, 6).T
    single = rows == 1
    to_pitch, from_pitch = to_pitch.masked_fill(single, 0), from_pitch.masked_fill(single, 0)
    aligned = destination | source | nbytes | to_pitch | from_pitch
    unit = sum(((aligned & ((1 << bits) - 1)) == 0).to(torch.int64) for bits in range(1, _WIDEST + 1))
    width, words = nbytes >> unit, (nbytes * rows) >> unit
    blocks = -(-(nbytes * rows) // _BLOCK_BYTES)
    first = blocks.cumsum(0) - blocks
    fields = destination, source, width, to_pitch >> unit, from_pitch >> unit, words, first, unit
    entries = torch.stack(fields, dim=1)
    owners = array("i")
    for entry, count in enumerate(blocks.tolist()):  # torch's repeat_interleave would wake a thread a core, for this
        owners.extend(array("i", [entry]) * count)
    return entries, torch.frombuffer(owners, dtype=torch.int32)


def _small(rectangles: Sequence[Rectangle]) -> Iterator[Rectangle]:
    """Without those that are empty, and with those that are too large in pieces."""
    for whole in rectangles:
        if whole.nbytes * whole.rows < _MOST_WORDS:
            if whole.nbytes and whole.rows:
                yield whole
        elif whole.rows == 1:
            for at in range(0, whole.nbytes, _MOST_WORDS):
                yield Rectangle(whole.destination + at, whole.source + at, min(_MOST_WORDS, whole.nbytes - at))
        else:
            for row in range(whole.rows):
                one = Rectangle(0, 0, whole.nbytes)
                yield from _small(
                    [
                        one.moved(
                            whole.destination + row * whole.destination_pitch, whole.source + row * whole.source_pitch
                        )
                    ]
                )

"""The fold on a GPU, as one kernel: of a bucket in a slot, or of tensors wherever they lie in the GPU's memory.

Either reads every byte once, at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from cpe_daemon.core.fold import LAST_SHIFT, ROUNDS, ROW_BYTES, STEP, WEIGHTS, modulo
from cpe_daemon.devices.cuda.kernels import Arguments, Kernel
from cpe_daemon.devices.fold_rows import Rows, signed

STRETCH_ALIGNMENT_BYTES: Final = 16
"""What the kernel reads at once."""

_THREADS: Final = 256
_BLOCKS_A_PROCESSOR: Final = 8
_WORDS_AT: Final = 0
"""Which argument is the slot."""

_MIX: Final = "".join(f"s = (s ^ s >> {shift}) * {factor:#x}ull; " for shift, factor in ROUNDS)

_IN_SLOT: Final = "at + k < rows ? words[(at + k) * 16 + lane] : make_ulonglong2(0, 0)"
_SCATTERED: Final = "read(words, at + k, rows, lane, starts, tails, &reading, &until)"
"""How sixteen bytes of a row come to a thread."""


def _source(read: str) -> str:
    return f"""
typedef unsigned long long u64;
__constant__ u64 weights[32] = {{{", ".join(f"{weight:#x}ull" for weight in WEIGHTS)}}};

__device__ __forceinline__ u64 kept(u64 word, int bytes) {{
  return bytes >= 8 ? word : bytes <= 0 ? 0 : word & ((1ull << 8 * bytes) - 1);
}}

// Of parts that begin at addresses of their own: origin + 256 * row is where a row of the part is. What lies behind a
// part's end is not read, but for the rest of sixteen bytes.
__device__ __forceinline__ ulonglong2 read(
    const ulonglong2* origins, long long row, long long rows, int lane, const long long* starts,
    const long long* tails, long long* part, long long* until)
{{
  if (row >= rows) return make_ulonglong2(0, 0);
  while (row >= *until) *until = starts[++*part + 1];
  if (row + 1 == *until && tails[*part] && 16 * lane >= tails[*part]) return make_ulonglong2(0, 0);
  const u64 origin = ((const u64*)origins)[*part];
  return *(const ulonglong2*)(origin + row * {ROW_BYTES} + 16 * lane);
}}

// Sixteen threads a row, two words each; every sixteen have as many rows, which follow one another.
extern "C" __global__ void __launch_bounds__({_THREADS}) fold(
    const ulonglong2* __restrict__ words,  // [rows][16]; or of each part its origin
    const long long* __restrict__ starts,  // [parts + 1]: the first row of each part, and the number of rows
    const u64* __restrict__ keys,          // [parts]
    const long long* __restrict__ tails,   // [parts]: bytes of the last row, if it is not full
    long long parts, long long rows, u64* total)
{{
  const int lane = threadIdx.x & 15;
  const long long thread = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  const long long teams = gridDim.x * (long long)blockDim.x / 16;
  const long long each = ((rows + teams - 1) / teams + 3) / 4 * 4;
  const long long first = thread / 16 * each;
  const u64 low = weights[2 * lane], high = weights[2 * lane + 1];
  long long part = 0;
  for (long long end = parts - 1; part < end;) {{
    const long long middle = (part + end + 1) / 2;
    if (starts[middle] <= first) part = middle; else end = middle - 1;
  }}
  long long next = starts[part + 1], reading = part, until = next;
  u64 sum = 0;
  for (long long at = first; at < first + each; at += 4) {{
    ulonglong2 word[4];
    #pragma unroll
    for (int k = 0; k < 4; ++k)
      word[k] = {read};
    #pragma unroll
    for (int k = 0; k < 4; ++k) {{
      const long long row = at + k;
      const bool here = row < rows;
      while (here && row >= next) next = starts[++part + 1];
      if (here && row + 1 == next && tails[part]) {{
        const int bytes = (int)tails[part] - 16 * lane;
        word[k].x = kept(word[k].x, bytes);
        word[k].y = kept(word[k].y, bytes - 8);
      }}
      u64 s = word[k].x * low + word[k].y * high;
      #pragma unroll
      for (int other = 8; other; other /= 2) s += __shfl_xor_sync(0xffffffffu, s, other);
      if (here) {{
        s += keys[part] + row * {STEP:#x}ull;
        {_MIX}
        sum += s ^ s >> {LAST_SHIFT};
      }}
    }}
  }}
  if (lane) sum = 0;
  sum += __shfl_xor_sync(0xffffffffu, sum, 16);
  if (threadIdx.x % 32 == 0 && sum) atomicAdd(total, sum);
}}
"""


class _Bucket(NamedTuple):
    """A bucket as the kernel wants it; the tensors keep what the arguments point to."""

    arguments: Arguments | None
    tensors: tuple[torch.Tensor, ...]


class KernelSum:
    """The kernel, and the sum of one version. Works on torch's current stream.

    Args:
        device: where the slots are; the thread's current one.

    Raises:
        ResourceError: it cannot be compiled here.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernel = Kernel(_source(_IN_SLOT), "fold", device.index)
        self._blocks = self._kernel.processors * _BLOCKS_A_PROCESSOR
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._device = device
        self._begun = False
        """Whether a bucket was added; the sum is set to 0 then, on the buckets' own stream."""

    def prepare(self, rows: Rows) -> _Bucket:
        """Move what describes the bucket to the GPU."""
        if not rows.total:
            return _Bucket(None, ())
        tensors = tuple(tensor.to(self._device) for tensor in (rows.starts, rows.keys, rows.tails))
        pointers = [tensor.data_ptr() for tensor in tensors]
        return _Bucket(Arguments([0, *pointers, len(rows.counts), rows.total, self._total.data_ptr()]), tensors)

    def add(self, prepared: _Bucket, slot: torch.Tensor) -> None:
        """Launch it over a bucket."""
        if not self._begun:
            self._total.zero_()
            self._begun = True
        if prepared.arguments is not None:
            prepared.arguments[_WORDS_AT] = slot.data_ptr()
            stream = torch.cuda.current_stream(self._device).cuda_stream
            self._kernel.launch(self._blocks, _THREADS, prepared.arguments, stream)

    def total(self) -> int:
        """The sum."""
        return modulo(int(self._total.item())) if self._begun else 0

    def begin(self) -> None:
        """Begin with 0 again."""
        self._begun = False


class Stretch(NamedTuple):
    """Whole rows of a tensor, in the memory of a GPU.

    Attributes:
        name: of the tensor.
        first_row: of the tensor.
        address: where that begins; a multiple of `STRETCH_ALIGNMENT_BYTES`.
        nbytes: of all its rows; of the last one there may be less than a row, where the tensor ends.
    """

    name: str
    first_row: int
    address: int
    nbytes: int


class ScatteredSum:
    """The kernel over stretches of tensors that lie anywhere. Works on torch's current stream; for one thread.

    What describes the stretches is kept for the next time, when they are mostly the same.

    Args:
        device: where they are; the thread's current one.

    Raises:
        ResourceError: it cannot be compiled here.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernel = Kernel(_source(_SCATTERED), "fold", device.index)
        self._device = device
        self._known: Sequence[Stretch] = ()
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._rows = 0

    def fold(self, stretches: Sequence[Stretch]) -> int:
        """The sum of the values of all rows, modulo 2^64. Waits for the GPU.

        Raises:
            CudaError: the GPU failed.
        """
        if self._known != stretches:
            self._describe(stretches)
        if not self._rows:
            return 0
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        pointers = [tensor.data_ptr() for tensor in self._tensors]
        arguments = Arguments([*pointers, len(stretches), self._rows, total.data_ptr()])
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernel.launch(self._kernel.processors * _BLOCKS_A_PROCESSOR, _THREADS, arguments, stream)
        return modulo(int(total.item()))

    def _describe(self, stretches: Sequence[Stretch]) -> None:
        names, first_rows, addresses, sizes = zip(*stretches, strict=True) if stretches else ((), (), (), ())
        rows = Rows.of(names, first_rows, sizes)
        origins = torch.tensor([signed(address) for address in addresses], dtype=torch.int64) - rows.begins * ROW_BYTES
        self._tensors = tuple(tensor.to(self._device) for tensor in (origins, rows.starts, rows.keys, rows.tails))
        self._rows, self._known = rows.total, list(stretches)

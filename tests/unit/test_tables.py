"""Rectangles are copied as they say: by the CPU, and by the GPU's kernel, which a C++ compiler can run here as well."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.devices.cuda import table
from cpe_daemon.devices.cuda.table import SOURCE, described
from cpe_daemon.devices.rows import copy_rows, copying

COMPILER = shutil.which("g++")
SLOT_BYTES = 1 << 20

Copying = Callable[[Sequence[Rectangle], int], None]
"""Called as copying(rectangles, base)."""

# The kernel is C++ but for what says where a thread is: threads are run one after another.
HOST = """
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
static Index blockIdx, threadIdx;
%s
extern "C" void run(const Entry* table, const int* owners, int blocks, unsigned long long base) {
  for (int block = 0; block < blocks; ++block)
    for (unsigned thread = 0; thread < %d; ++thread) {
      blockIdx.x = block, threadIdx.x = thread;
      copy_table(table, owners, base);
    }
}
"""


def by_cpu(rectangles: Sequence[Rectangle], base: int) -> None:
    copying(rectangles)(base)


def by_torch(rectangles: Sequence[Rectangle], base: int) -> None:
    """As on a GPU without the kernel."""
    for rectangle in rectangles:
        copy_rows(rectangle.moved(0, base), memory_at)


def memory_at(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory: pytest.TempPathFactory) -> Copying:
    if COMPILER is None:
        pytest.skip("no g++ here")
    folder: Path = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cc").write_text(HOST % (SOURCE, table._THREADS))
    built = folder / "kernel.so"
    warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
    sources = ["-O1", "-fsanitize-undefined-trap-on-error", "-fsanitize=undefined", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *sources, *warnings, "-o", str(built), str(folder / "kernel.cc")], check=True)
    run = ctypes.CDLL(str(built)).run
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]

    def copy(rectangles: Sequence[Rectangle], base: int) -> None:
        entries, owners = described(rectangles)
        run(entries.data_ptr(), owners.data_ptr(), len(owners), base)

    return copy


@pytest.fixture(params=["cpu", "torch", "kernel"])
def copying_by(request: pytest.FixtureRequest) -> Copying:
    if request.param == "kernel":
        found: Copying = request.getfixturevalue("by_kernel")
        return found
    return by_cpu if request.param == "cpu" else by_torch


def aligned(nbytes: int) -> torch.Tensor:
    whole = torch.zeros(nbytes + 256, dtype=torch.uint8)
    return whole[-whole.data_ptr() % 256 :][:nbytes]


@pytest.fixture(scope="module")
def slot() -> torch.Tensor:
    made = aligned(SLOT_BYTES)
    made.copy_(torch.frombuffer(bytearray(random.Random(3).randbytes(SLOT_BYTES)), dtype=torch.uint8))
    return made


def check(copying_by: Copying, slot: torch.Tensor, rectangles: Sequence[Rectangle]) -> None:
    """Their destinations count from the beginning of a memory here."""
    memory = aligned(max((whole.destination_end for whole in rectangles), default=0) + 64)
    expected = memory.clone()
    for whole in rectangles:
        for row in range(whole.rows):
            to, at = whole.destination + row * whole.destination_pitch, whole.source + row * whole.source_pitch
            expected[to : to + whole.nbytes] = slot[at : at + whole.nbytes]
    copying_by([whole.moved(memory.data_ptr(), 0) for whole in rectangles], slot.data_ptr())
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16, 48])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 7), (5, 1), (4, 3), (37, 11), (1, 4096), (3, 700), (300, 64), (1, 20_000), (2, 9000)],
    ids=str,
)
def test_rows_are_copied_whatever_their_alignment(
    copying_by: Copying, slot: torch.Tensor, unit: int, shape: tuple[int, int]
) -> None:
    rows, width = shape[0], shape[1] * unit
    if rows * (width + 3 * unit) > SLOT_BYTES:
        width = SLOT_BYTES // rows // unit * unit - 3 * unit
    check(copying_by, slot, [Rectangle(unit, 2 * unit, width, rows, width + unit, width + 3 * unit)])


def test_nothing_is_copied_of_nothing(copying_by: Copying, slot: torch.Tensor) -> None:
    check(copying_by, slot, [])
    check(copying_by, slot, [Rectangle(0, 5, 0), Rectangle(3, 0, 4), Rectangle(9, 0, 0)])


def test_pitches_of_a_single_row_do_not_count(copying_by: Copying, slot: torch.Tensor) -> None:
    check(copying_by, slot, [Rectangle(16, 32, 48, 1, 7, 9)])


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_table_copies_what_its_rectangles_say(by_kernel: Copying, slot: torch.Tensor, data: st.DataObject) -> None:
    rectangles, at = [], 0
    for _ in range(data.draw(st.integers(1, 20))):
        unit = 1 << data.draw(st.integers(0, 5))
        at = -(-at // unit) * unit
        width, rows = unit * data.draw(st.integers(1, 400)), data.draw(st.integers(1, 9))
        pitches = [width + unit * data.draw(st.integers(0, 3)) for _ in range(2)]
        source = unit * data.draw(st.integers(0, 1000))
        rectangles.append(Rectangle(at, source, width, rows, *pitches))
        at = rectangles[-1].destination_end
    check(by_kernel, slot, rectangles)


def test_what_the_kernel_cannot_count_is_cut(
    by_kernel: Copying, slot: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_MOST_WORDS", 1 << 12)
    entries, _ = described([Rectangle(0, 0, 10_000), Rectangle(20_000, 0, 600, 20, 800, 700)])
    assert entries[:, 5].max() <= 1 << 12
    check(by_kernel, slot, [Rectangle(0, 0, 10_000), Rectangle(20_000, 0, 600, 20, 800, 700)])

"""The kernel that goes by a table of copies, on the last GPU that there is: every alignment, many entries, columns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.devices.cuda.table import Tables

pytestmark = pytest.mark.gpu

SLOT_BYTES = 32 << 20


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.fixture(scope="module")
def tables(gpu: torch.device) -> Tables:
    with torch.cuda.device(gpu):
        torch.empty(1, device=gpu)
        return Tables(gpu.index)


@pytest.fixture(scope="module")
def slots(gpu: torch.device) -> list[torch.Tensor]:
    """Two of the same size, with other contents."""
    return [torch.empty(SLOT_BYTES // 8, dtype=torch.int64, device=gpu).random_().view(torch.uint8) for _ in range(2)]


def check(tables: Tables, slots: Sequence[torch.Tensor], rectangles: Sequence[Rectangle]) -> None:
    """Out of either slot, by one table; what is around the rows is left alone."""
    gpu = slots[0].device
    with torch.cuda.device(gpu), torch.cuda.stream(torch.cuda.Stream(gpu)):
        memory = torch.zeros(max(whole.destination_end for whole in rectangles) + 64, dtype=torch.uint8, device=gpu)
        table = tables.make([whole.moved(memory.data_ptr(), 0) for whole in rectangles])
        for slot in slots:
            memory.zero_()
            table.copy(slot.data_ptr(), torch.cuda.current_stream().cuda_stream)
            got, held = memory.cpu(), slot.cpu()
            expected = torch.zeros_like(got)
            for whole in rectangles:
                shape = whole.rows, whole.nbytes
                rows = held.as_strided(shape, (whole.source_pitch or 1, 1), whole.source)
                expected.as_strided(shape, (whole.destination_pitch or 1, 1), whole.destination).copy_(rows)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16, 48])
def test_rows_are_copied_whatever_their_alignment(tables: Tables, slots: list[torch.Tensor], unit: int) -> None:
    shapes = [(1, 1), (1, 7), (5, 1), (37, 11), (1, 4096), (300, 64), (1, 20_000), (2, 9000), (1000, 700)]
    for rows, words in shapes:
        width = words * unit
        while rows * (width + 3 * unit) > SLOT_BYTES:
            rows //= 2  # as many as there is room for
        check(tables, slots, [Rectangle(unit, 2 * unit, width, rows, width + unit, width + 3 * unit)])


def test_many_entries_of_every_kind_are_one_launch(tables: Tables, slots: list[torch.Tensor]) -> None:
    rng, rectangles, at = random.Random(5), list[Rectangle](), 0
    for _ in range(20_000):
        unit = 1 << rng.randrange(6)
        width, rows = unit * rng.randrange(1, 40), rng.choice([1, 1, 1, 7, 60])
        pitches = [width + unit * rng.randrange(3) for _ in range(2)]
        at = -(-at // unit) * unit
        source = unit * rng.randrange((SLOT_BYTES // 2) // unit)
        rectangles.append(Rectangle(at, source, width, rows, *pitches))
        at = rectangles[-1].destination_end
    check(tables, slots, rectangles)


def test_columns_of_one_matrix_come_from_several_tensors(tables: Tables, slots: list[torch.Tensor]) -> None:
    widths = [256, 512, 2, 30, 224]
    begins = [0, *itertools.accumulate(widths)]
    pitch = begins.pop()
    columns = [
        Rectangle(begin, 3 * pitch * at * 1000, width, 1000, pitch, 3 * pitch)
        for at, (begin, width) in enumerate(zip(begins, widths, strict=True))
    ]
    check(tables, slots, columns)


def test_large_run_is_copied_whole(tables: Tables, slots: list[torch.Tensor]) -> None:
    check(tables, slots, [Rectangle(0, 0, SLOT_BYTES), Rectangle(SLOT_BYTES + 3, 5, SLOT_BYTES - 5)])

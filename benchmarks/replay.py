"""Copies out of slots to parameters, by tables: ``python -m benchmarks.replay --device cuda``.

Two sets of tensors, as large mixtures of experts have them: 36,000 of 512 KiB and 140,000 of 128 KiB (a hundredth of
these on the CPU), in buckets of 256 MiB. Every fourth is a row-parallel rank's: half of the columns of a matrix that
is twice as large. Contents are random; after the runs all destinations are compared with what they should hold.

What is timed is what a worker does in each round with buckets that it knows: issue every bucket's table out of its
slot, and wait for the device. ``worker_seconds`` is the same with the worker's own look at the buckets' parts (see
`inference_plugins.assembly.Assembly.take`), which a GPU does not wait for while it is behind; ``first_seconds`` has
the making of the tables too. The floor is a plain copy of as many bytes by the device in the same run: each is read and
written once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch

from benchmarks.arguments import positive
from benchmarks.report import compared, finish, rate, ratio, show, spread
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import align
from cpe_daemon.devices.rows import copying
from cpe_daemon.devices.slots import Replay
from cpe_daemon.wire.messages import TensorPart
from inference_plugins.assembly import Assembly, Place, Placement

BAR: Final = 1.3
"""How many times the floor a replay may take on a GPU."""

_SETS: Final = ((36_000, 512 << 10), (140_000, 128 << 10))
_CPU_SHARE: Final = 100
_BUCKET_BYTES: Final = 256 << 20
_STRIDED: Final = 4
"""One of so many tensors is a slice of another's columns."""
_ROW_BYTES: Final = 4096
"""Of such a slice."""


class Bucket(NamedTuple):
    """What is to be copied out of one slot."""

    base: int
    parts: list[TensorPart]
    places: list[Placement | None]


class Device:
    """Where the memory is, and who copies.

    Args:
        kind: "cpu" or "cuda".
    """

    def __init__(self, kind: str) -> None:
        self.torch = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        self._tables: Any = None
        if kind == "cuda":
            from cpe_daemon.devices.cuda.table import Tables  # only where there is a driver

            torch.cuda.set_device(0)
            torch.cuda.init()
            torch.empty(1, device=self.torch)
            self._tables = Tables(0)
            self.name = torch.cuda.get_device_name(0)
        else:
            self.name = "CPU"

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        """As `cpe_daemon.devices.slots.Slots.prepare`."""
        if self._tables is None:
            return copying(rectangles)
        table, stream = self._tables.make(rectangles), torch.cuda.current_stream().cuda_stream
        return lambda base: table.copy(base, stream)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until what ``work`` issues is done."""
        self._settle()
        began = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        if self.torch.type == "cuda":
            torch.cuda.synchronize()


class Model:
    """So many tensors of one size, the slots that they came in, and their places.

    Args:
        device: where all of it is.
        count: tensors.
        nbytes: of each that is wanted.
    """

    def __init__(self, device: Device, count: int, nbytes: int) -> None:
        self.nbytes = count * nbytes
        sizes = [2 * nbytes if index % _STRIDED == 0 else nbytes for index in range(count)]
        self.buckets: list[Bucket] = []
        self._device, self._count, self._each = device, count, nbytes
        self._destination = torch.zeros(self.nbytes, dtype=torch.uint8, device=device.torch)
        self._source = torch.empty(sum(map(align, sizes)) // 8, dtype=torch.int64, device=device.torch).random_()
        base, at, room = self._source.data_ptr(), 0, 0
        self._offsets = list[int]()
        begin = 0
        for index, size in enumerate(sizes):
            if room < align(size):
                self.buckets.append(Bucket(base + at, [], []))
                begin, room = at, _BUCKET_BYTES
            bucket, address = self.buckets[-1], self._destination.data_ptr() + index * nbytes
            bucket.parts.append(TensorPart(f"experts.{index}.weight", "uint8", (size,), 0, size, at - begin))
            bucket.places.append(_place(address, nbytes, strided=size > nbytes))
            self._offsets.append(at)
            at, room = at + align(size), room - align(size)

    def wrong(self) -> int:
        """Tensors whose places do not hold what they should."""
        source = self._source.view(torch.uint8)
        wrong = torch.zeros((), dtype=torch.int64, device=self._device.torch)
        for index, at in enumerate(self._offsets):
            held = self._destination.narrow(0, index * self._each, self._each)
            if index % _STRIDED == 0:
                wanted = source.narrow(0, at, 2 * self._each).view(-1, 2 * _ROW_BYTES)[:, _ROW_BYTES:]
            else:
                wanted = source.narrow(0, at, self._each).view(-1, _ROW_BYTES)
            wrong += (held.view(-1, _ROW_BYTES) != wanted).any()
        return int(wrong.item())

    def forget(self) -> None:
        """Overwrite what was copied."""
        self._destination.zero_()

    def copied(self) -> None:
        """The floor: as many bytes from one place to another."""
        nbytes = self.nbytes // 8
        self._destination.view(torch.int64).copy_(self._source[:nbytes])


def _place(address: int, nbytes: int, *, strided: bool) -> Placement:
    if not strided:
        return Place(address, nbytes)
    rows = nbytes // _ROW_BYTES
    return (Rectangle(address, _ROW_BYTES, _ROW_BYTES, rows, _ROW_BYTES, 2 * _ROW_BYTES),)


class Measured(NamedTuple):
    """Seconds of each run."""

    first: float
    replay: list[float]
    worker: list[float]
    floor: list[float]
    wrong: int


def measure(device: Device, model: Model, runs: int) -> Measured:
    """Time a set of tensors, one way after another, in turns."""
    slots = [_Slot(bucket.base) for bucket in model.buckets]
    assembly = Assembly()

    def take() -> None:
        for seq, (bucket, slot) in enumerate(zip(model.buckets, slots, strict=True)):
            assembly.take(bucket.parts, slot.tensor(), bucket.places, device, seq)

    first = device.timed(take)
    replays = [known.replay for known in assembly._known.values()]

    def replay() -> None:
        for again, slot in zip(replays, slots, strict=True):
            again(slot.base)

    model.copied()  # what is warmed up on one side is on the other
    model.forget()
    replay()
    measured = Measured(first, [], [], [], model.wrong())
    for _ in range(runs):
        measured.replay.append(device.timed(replay))
        measured.worker.append(device.timed(take))
        measured.floor.append(device.timed(model.copied))
    return measured


class _Slot:
    """As much of a slot as the worker's own part asks for: its address and its size."""

    def __init__(self, base: int) -> None:
        self.base = base

    def tensor(self) -> Any:
        return self

    def data_ptr(self) -> int:
        return self.base

    def numel(self) -> int:
        return _BUCKET_BYTES


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sets, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=positive, default=10)
    asked = parser.parse_args(arguments)
    device, share = Device(asked.device), _CPU_SHARE if asked.device == "cpu" else 1
    rows, results = [], {}
    for count, nbytes in _SETS:
        model = Model(device, count // share, nbytes)
        measured = measure(device, model, asked.runs)
        name = f"{count // share} x {nbytes >> 10} KiB"
        results[name] = model.nbytes, measured
        medians = [statistics.median(measured.worker), measured.first]
        rows.append(
            (
                name,
                spread(measured.floor),
                spread(measured.replay),
                f"{ratio(measured.replay, measured.floor):.2f}",
                rate(2 * model.nbytes, measured.replay),
                *(f"{seconds:.4f} s" for seconds in medians),
                measured.wrong,
            )
        )
        del model
    columns = ("tensors", "floor", "replay", "ratio", "read + written", "with parts", "first", "wrong")
    show(f"Replay on {device.name}, every fourth tensor a slice of columns", columns, rows)
    worst = max(results.values(), key=lambda result: ratio(result[1].replay, result[1].floor))
    finish(
        compared(
            "replay",
            device=device.name,
            nbytes=worst[0],
            seconds=worst[1].replay,
            floor_seconds=worst[1].floor,
            bar=BAR,
            wrong=sum(result[1].wrong for result in results.values()),
            ratios={name: round(ratio(taken.replay, taken.floor), 4) for name, (_, taken) in results.items()},
            worker_seconds={name: round(statistics.median(taken.worker), 6) for name, (_, taken) in results.items()},
            first_seconds={name: round(taken.first, 6) for name, (_, taken) in results.items()},
        )
    )


if __name__ == "__main__":
    main()

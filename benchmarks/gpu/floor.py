"""The floor of a push, as ``python -m benchmarks.gpu.floor``: the bytes alone, over all links at once.

One process copies pinned host memory, of the kind that the arena is, to buffers of the slots' size on every GPU: each
gets its share of the bytes, in chunks of its share of a slot, by plain asynchronous copies on one stream. No messages,
no engines, no checks. The other way, one GPU's buffer to host memory, is the floor of a trainer on that GPU.

It answers each line of its standard input with a line of JSON: the seconds of one run. On a CPU host memory stands in
for the GPUs', and `memmove` for their copies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Protocol

from benchmarks.gpu.engine import say
from benchmarks.models import MODELS
from cpe_daemon.core.types import align
from cpe_daemon.devices.cuda.driver import Driver, driver
from cpe_daemon.devices.memory import SharedMemory, copy

_SOURCE_BYTES: Final = 4 << 30
"""Host memory that is copied from, over and over: far more than any cache."""

_MOST_SLOTS: Final = 3
"""With more, only the place of the bytes would be another one, and the engines need the memory."""

_RING_CHUNK_BYTES: Final = 16 << 20
"""What a trainer copies at a time: the landing ring's default."""


class Link(Protocol):
    """One GPU's buffer and its link to the host."""

    def copy(self, buffer_at: int, host_at: int, nbytes: int) -> None:
        """Issue a copy to the buffer."""
        ...

    def copy_back(self, buffer_at: int, host_at: int, nbytes: int) -> None:
        """Issue a copy from the buffer."""
        ...

    def wait(self) -> None:
        """Wait for all copies that were issued."""
        ...


class GpuLink:
    """A GPU's; every method belongs to one thread.

    Args:
        driver: of this host.
        uuid: of the GPU.
        buffer_bytes: memory to take there.
    """

    def __init__(self, driver: Driver, uuid: str, buffer_bytes: int) -> None:
        self._driver = driver
        device = next(device for device in driver.devices() if driver.uuid(device) == uuid)
        driver.use(driver.retain(device))
        self._buffer = driver.allocate(buffer_bytes)
        self._stream, self._event = driver.create_stream(), driver.create_event()

    def copy(self, buffer_at: int, host_at: int, nbytes: int) -> None:
        """Issue a copy to the GPU."""
        self._driver.copy_to_device(self._buffer + buffer_at, host_at, nbytes, self._stream)

    def copy_back(self, buffer_at: int, host_at: int, nbytes: int) -> None:
        """Issue a copy from the GPU."""
        self._driver.copy_to_host(host_at, self._buffer + buffer_at, nbytes, self._stream)

    def wait(self) -> None:
        """Wait for all copies that were issued."""
        self._driver.record(self._event, self._stream)
        self._driver.wait(self._event)


class HostLink:
    """Host memory in a GPU's place; copies are done when they are issued."""

    def __init__(self, buffer_bytes: int) -> None:
        self._memory = touched(buffer_bytes)

    def copy(self, buffer_at: int, host_at: int, nbytes: int) -> None:
        """Copy to the buffer."""
        copy(self._memory.address + buffer_at, host_at, nbytes)

    def copy_back(self, buffer_at: int, host_at: int, nbytes: int) -> None:
        """Copy from the buffer."""
        copy(host_at, self._memory.address + buffer_at, nbytes)

    def wait(self) -> None:
        """Nothing is ever under way."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One copy: places in the GPU's buffer and in host memory."""

    buffer_at: int
    host_at: int
    nbytes: int


def chunks(nbytes: int, chunk_bytes: int, buffer_bytes: int, host_bytes: int) -> Iterator[Chunk]:
    """Cut ``nbytes`` into copies that go round and round in the buffer and in host memory."""
    in_buffer, in_host = buffer_bytes // chunk_bytes, host_bytes // chunk_bytes
    for number, start in enumerate(range(0, nbytes, chunk_bytes)):
        length = min(chunk_bytes, nbytes - start)
        yield Chunk(number % in_buffer * chunk_bytes, number % in_host * chunk_bytes, length)


class Floor:
    """Host memory and the links, ready to be run any number of times.

    Args:
        gpus: UUIDs; names of another kind stand for host memory.
        nbytes: of a version.
        slot_bytes: size of a slot.
        slots: how many.
    """

    def __init__(self, gpus: Sequence[str], nbytes: int, slot_bytes: int, slots: int) -> None:
        self._nbytes = nbytes
        self._share = align(slot_bytes // len(gpus))
        self._buffer_bytes = min(max(slots, 2), _MOST_SLOTS) * max(slot_bytes, self._share)
        host = touched(max(min(_SOURCE_BYTES, align(nbytes)), self._buffer_bytes))
        self._host, self._host_bytes = host, host.nbytes // len(gpus)
        self._threads = [ThreadPoolExecutor(1, f"link-{gpu}") for gpu in gpus]
        self._links = [thread.submit(self._link, gpu).result() for thread, gpu in zip(self._threads, gpus, strict=True)]
        if gpus[0].startswith("GPU-"):  # by the first thread, which has a context; for all GPUs
            self._threads[0].submit(driver().register, host.address, host.nbytes).result()

    def run(self) -> float:
        """Copy a version's bytes to the GPUs, to each its share; return the seconds it took."""
        each = align(-(-self._nbytes // len(self._links)))
        began = time.perf_counter()
        for done in [
            thread.submit(self._push, link, each, self._host.address + number * self._host_bytes)
            for number, (thread, link) in enumerate(zip(self._threads, self._links, strict=True))
        ]:
            done.result()
        return time.perf_counter() - began

    def run_back(self) -> float:
        """Copy a version's bytes from the first GPU; return the seconds it took."""
        began = time.perf_counter()
        self._threads[0].submit(self._pull, self._links[0]).result()
        return time.perf_counter() - began

    def close(self) -> None:
        """End the threads; memory goes with the process."""
        for thread in self._threads:
            thread.shutdown()

    def _link(self, gpu: str) -> Link:
        if gpu.startswith("GPU-"):
            return GpuLink(driver(), gpu, self._buffer_bytes)
        return HostLink(self._buffer_bytes)

    def _push(self, link: Link, nbytes: int, host_at: int) -> None:
        for chunk in chunks(nbytes, self._share, self._buffer_bytes, self._host_bytes):
            link.copy(chunk.buffer_at, host_at + chunk.host_at, chunk.nbytes)
        link.wait()

    def _pull(self, link: Link) -> None:
        chunk_bytes = min(_RING_CHUNK_BYTES, self._host_bytes, self._buffer_bytes)
        for chunk in chunks(self._nbytes, chunk_bytes, self._buffer_bytes, self._host_bytes):
            link.copy_back(chunk.buffer_at, self._host.address + chunk.host_at, chunk.nbytes)
        link.wait()


def touched(nbytes: int) -> SharedMemory:
    """Memory of the kind that the arena is, all of it there."""
    memory = SharedMemory.create("floor", nbytes)
    memory.prefault(0, nbytes)
    return memory


def main(arguments: Sequence[str] | None = None) -> None:
    """Run once for each line of standard input, until it ends: ``{"back": true}`` from the GPU, else to the GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--gpus", required=True, help="UUIDs, with commas between them")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--slot-bytes", type=int, required=True)
    asked = parser.parse_args(arguments)
    with ExitStack() as undo:
        floor = Floor(asked.gpus.split(","), MODELS[asked.model].nbytes, asked.slot_bytes, asked.slots)
        undo.callback(floor.close)
        say({"ready": True})
        for line in sys.stdin:
            say({"seconds": floor.run_back() if json.loads(line).get("back") else floor.run()})


if __name__ == "__main__":
    main()

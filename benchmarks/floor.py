"""The floor of a push: what the copies alone cost, as ``python -m benchmarks.floor``, a process that is told to run.

One process streams the bytes of a version through slots of the same number and size into one worker's tensors: a thread
copies each bucket from the source into a free slot with one `memmove`, another copies every tensor from the slot to its
place. The two overlap; between them is a queue, and nothing else: no messages, no checks, no other process. Buckets are
those of the product's plan, and all memory has been touched before.

It answers each line of its standard input with a line of JSON: the seconds of one run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import queue
import sys
import threading
import time
from collections.abc import Sequence

import torch

from benchmarks.models import DENSE
from cpe_daemon.core.buckets import Cut, cut
from cpe_daemon.demo.architecture import Architecture
from cpe_daemon.demo.engine import local_tensors
from cpe_daemon.devices.memory import SharedMemory


class Floor:
    """Source, slots and tensors, ready to be streamed any number of times.

    Args:
        architecture: the model.
        slots: how many.
        slot_bytes: size of each.
    """

    def __init__(self, architecture: Architecture, slots: int, slot_bytes: int) -> None:
        self.buckets: Cut = cut(list(architecture.specs()), slot_bytes)
        self._tensors = local_tensors(architecture, 1, seed=1)
        self._places = [tensor.data_ptr() for tensor in self._tensors.values()]
        self._source = _touched("floor-source", sum(filling.nbytes for filling in self.buckets.fillings))
        self._slots = _touched("floor-slots", slots * slot_bytes)
        self._addresses = [self._slots.address + slot * slot_bytes for slot in range(slots)]

    def run(self) -> float:
        """Stream everything once; return the seconds it took."""
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        full: queue.SimpleQueue[int] = queue.SimpleQueue()
        for address in self._addresses:
            free.put(address)
        fetcher = threading.Thread(target=self._fetch, args=(free, full))
        began = time.perf_counter()
        fetcher.start()
        self._load(free, full)
        seconds = time.perf_counter() - began
        fetcher.join()
        return seconds

    def _fetch(self, free: queue.SimpleQueue[int], full: queue.SimpleQueue[int]) -> None:
        source = self._source.address
        for filling in self.buckets.fillings:
            slot = free.get()
            ctypes.memmove(slot, source, filling.nbytes)
            full.put(slot)
            source += filling.nbytes

    def _load(self, free: queue.SimpleQueue[int], full: queue.SimpleQueue[int]) -> None:
        for filling in self.buckets.fillings:
            slot = full.get()
            for part in filling.parts:
                ctypes.memmove(self._places[part.tensor] + part.tensor_offset, slot + part.slot_offset, part.nbytes)
            free.put(slot)


def _touched(name: str, nbytes: int) -> SharedMemory:
    memory = SharedMemory.create(name, nbytes)
    memory.prefault(0, nbytes)
    memory.view[:nbytes] = bytes(nbytes)
    return memory


def main(arguments: Sequence[str] | None = None) -> None:
    """Run once for each line of standard input, until it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(DENSE), required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--slot-bytes", type=int, required=True)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    floor = Floor(DENSE[asked.model], asked.slots, asked.slot_bytes)
    _say({"ready": True, "buckets": len(floor.buckets.fillings)})
    for _ in sys.stdin:
        _say({"seconds": floor.run()})


def _say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

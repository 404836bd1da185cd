"""``python -m benchmarks.issue``: how many copies a second this process can issue, and how many eight links need.

Each of eight lanes is a thread with a stream, as the daemon has one for each GPU, and all share one interpreter. They
issue tiny copies in bursts that a stream's queue can hold, so that neither the link nor the GPU slows the issuing down;
only that is timed. Beside it: the copies of a size that eight links of 55 GB/s would carry in the same time.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from benchmarks import report
from cpe_daemon.devices.cuda.driver import Driver, driver
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import CpeError

LINK_BYTES_PER_SECOND: Final = 55e9
LINKS: Final = 8
_COPY_BYTES: Final = 256
_BURST: Final = 256
_SIZES: Final = (32 << 20, 4 << 20, 1 << 20, 256 << 10, 64 << 10)
"""Of copies: the first is an eighth of a slot, and the last a small tensor by itself."""

_EPILOG: Final = """\
The last line is JSON: bench, lanes, gpus, copies (in all), seconds (of each burst), rate (copies a second), needed (by
size of a copy) and smallest_bytes, the size at which eight links need as many as can be issued."""


class Lane:
    """A stream of a GPU, and a thread that issues on it.

    Args:
        driver: of this host.
        device: the driver's number of the GPU.
        source: address of pinned memory.
    """

    def __init__(self, driver: Driver, device: int, source: int) -> None:
        self._driver = driver
        self._source = source
        self._context = driver.retain(device)
        driver.use(self._context)
        self._destination = driver.allocate(_COPY_BYTES)
        self._stream, self._event = driver.create_stream(), driver.create_event()

    def issue(self, start: threading.Barrier, ended: list[float]) -> None:
        """Issue a burst when all lanes are ready, note when that was done, and wait for the copies."""
        self._driver.use(self._context)
        start.wait()
        for _ in range(_BURST):
            self._driver.copy_to_device(self._destination, self._source, _COPY_BYTES, self._stream)
        ended.append(time.perf_counter())
        self._driver.record(self._event, self._stream)
        self._driver.wait(self._event)


def burst(lanes: Sequence[Lane]) -> float:
    """Have every lane issue its copies at once; return the seconds until the last was issued."""
    began: list[float] = []
    ended: list[float] = []
    start = threading.Barrier(len(lanes), action=lambda: began.append(time.perf_counter()))
    threads = [threading.Thread(target=lane.issue, args=(start, ended)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(ended) - began[0]


def needed(copy_bytes: int) -> float:
    """Copies of a size that eight links carry in a second."""
    return LINKS * LINK_BYTES_PER_SECOND / copy_bytes


def measure(driver: Driver, lanes: int, bursts: int) -> list[float]:
    """Return the seconds of each burst; lanes are dealt to the GPUs in turn."""
    memory = SharedMemory.create("issue", 1 << 20)
    memory.prefault(0, memory.nbytes)
    devices = driver.devices()
    driver.use(driver.retain(devices[0]))
    driver.register(memory.address, memory.nbytes)
    made = [Lane(driver, devices[number % len(devices)], memory.address) for number in range(lanes)]
    burst(made)
    return [burst(made) for _ in range(bursts)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.issue",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lanes", type=int, default=LINKS, metavar="N", help="threads that issue (8)")
    parser.add_argument("--bursts", type=int, default=200, metavar="N", help="how often (200)")
    parser.add_argument("--quick", action="store_true", help="a few bursts")
    asked = parser.parse_args(arguments)
    try:
        gpus = len(driver().devices())
        seconds = measure(driver(), asked.lanes, 5 if asked.quick else asked.bursts)
    except CpeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    copies = asked.lanes * _BURST
    rate = copies * len(seconds) / sum(seconds)
    _show(rate, asked.lanes, gpus)
    report.finish(
        {
            "bench": "issue",
            "lanes": asked.lanes,
            "gpus": gpus,
            "copies": copies * len(seconds),
            "seconds": report.rounded(seconds),
            "rate": round(rate, 1),
            "needed": {size: round(needed(size), 1) for size in _SIZES},
            "smallest_bytes": round(LINKS * LINK_BYTES_PER_SECOND / rate),
        }
    )
    return 0


def _show(rate: float, lanes: int, gpus: int) -> None:
    report.show(
        f"{lanes} lanes on {gpus} GPUs issue {rate:,.0f} copies a second, {1e6 / rate:.1f} µs each",
        ("copies of", "8 links need", "of what can be issued"),
        [(_size(size), f"{needed(size):,.0f}/s", f"{needed(size) / rate:.1%}") for size in _SIZES],
        notes=[f"at {LINK_BYTES_PER_SECOND / 1e9:g} GB/s a link; only the issuing is timed, all lanes at once"],
    )


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >> 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    sys.exit(main())

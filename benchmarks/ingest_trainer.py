"""The trainer of ``benchmarks.ingest``, as ``python -m benchmarks.ingest_trainer``: a `Publisher` in a process.

It answers each line of its standard input with a line of JSON: the seconds from the call of ``publish`` to the moment
that the daemon's "staged" was heard, and those that ``publish`` itself took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.models import DENSE
from cpe_daemon.demo.engine import local_tensors
from cpe_daemon.publisher import Publisher

_STAGED_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish once for each line of standard input, until it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(DENSE), required=True)
    parser.add_argument("--endpoint", required=True, help="of the daemon")
    parser.add_argument("--landing", action="store_true", help="use a landing ring; else send frames")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tensors = local_tensors(DENSE[asked.model], 1, seed=7)
    with Publisher(asked.endpoint, model="bench", run="ingest", landing=asked.landing) as publisher:
        _say({"ready": True, "bytes": sum(tensor.nbytes for tensor in tensors.values())})
        for number, _ in enumerate(sys.stdin):
            for tensor in tensors.values():
                tensor.view(-1)[0] += 1.0
            began = time.perf_counter()
            handle = publisher.publish(tensors, version=number)
            returned = time.perf_counter() - began
            handle.staged(_STAGED_SECONDS)
            _say({"seconds": time.perf_counter() - began, "returned": returned})


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

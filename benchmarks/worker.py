"""One engine worker of a benchmark, as a process: ``python -m benchmarks.worker``. It holds tensors, and serves nobody.

It answers each line of its standard input with a line of JSON: the version that it holds, and every tensor's digest,
so that a benchmark can tell that what it timed was the update that it meant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Final

from benchmarks.models import DENSE
from cpe_daemon.demo.architecture import shared_dimension
from cpe_daemon.demo.digests import digests_of
from cpe_daemon.demo.engine import local_tensors
from inference_plugins.torch import attach

_CONNECT_SECONDS: Final = 60.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Attach, and answer until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(DENSE), required=True)
    parser.add_argument("--socket", required=True, help="the daemon's socket for engines")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--gpu", required=True, help="the set of slots to load from")
    asked = parser.parse_args(arguments)
    tensors = local_tensors(DENSE[asked.model], asked.world_size, seed=1000 + asked.rank)
    with attach(
        tensors,
        engine="bench",
        rank=asked.rank,
        world_size=asked.world_size,
        socket=asked.socket,
        slicing=shared_dimension,
        gpu=asked.gpu,
        connect_timeout=_CONNECT_SECONDS,
    ) as attachment:
        _say({"ready": True})
        for _ in sys.stdin:
            with attachment.lock:
                version = attachment.version
                _say({"version": version.number if version else None, "digests": digests_of(tensors.items())})


def _say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""The trainer, as ``python -m benchmarks.gpu.trainer``: it publishes a version for each line of its standard input.

It answers by a line of JSON: the seconds from the call of ``publish`` to the moment that the version was heard to be
live, those that ``publish`` took, and the daemon's report; or the error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from benchmarks.gpu.contents import Contents
from benchmarks.gpu.engine import device_of, say
from benchmarks.models import MODELS
from cpe_daemon.errors import CpeError
from cpe_daemon.publisher import Publisher

MODEL: Final = "bench"
_CONNECT_SECONDS: Final = 300.0
_LIVE_SECONDS: Final = 300.0


def publish(publisher: Publisher, contents: Contents, version: int) -> dict[str, Any]:
    """Publish a version, and wait until it is live."""
    tensors = contents.version(version)
    began = time.perf_counter()
    try:
        handle = publisher.publish(tensors, version=version)
        returned = time.perf_counter() - began
        report = handle.live(_LIVE_SECONDS)
        seconds = time.perf_counter() - began
    except CpeError as error:
        return {"version": version, "error": f"{error.message} [{error.code}]"}
    (node,) = report.nodes.values()
    return {"version": version, "seconds": seconds, "returned": returned, "report": msgspec.to_builtins(node)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--endpoint", required=True, help="of the daemon")
    parser.add_argument("--run", required=True)
    parser.add_argument("--gpu", default="", help="UUID of the GPU that holds the tensors; none: host memory")
    asked = parser.parse_args(arguments)
    contents = Contents(MODELS[asked.model], device_of(asked.gpu) if asked.gpu else "cpu")
    with Publisher(asked.endpoint, model=MODEL, run=asked.run, connect_timeout=_CONNECT_SECONDS) as publisher:
        say({"ready": True})
        for line in sys.stdin:
            say(publish(publisher, contents, int(json.loads(line)["version"])))


if __name__ == "__main__":
    main()

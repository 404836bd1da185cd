"""Puts a checkpoint into the running engines of this node: what one calls when new weights lie on a disk.

python examples/update.py CHECKPOINT_DIR RUNTIME_DIR --model policy --version 7
torchrun --nproc-per-node 4 examples/update.py ...      four processes, each of which reads and sends its part
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from cpe_daemon.errors import CpeError
from cpe_daemon.publisher import Publisher

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", type=Path, help="a directory of safetensors, as Hugging Face has them")
parser.add_argument("runtime_dir", type=Path, help="where `cpe serve` runs: `cpe config` shows it")
parser.add_argument("--model", required=True, help="its name, as the engines know it (CPE_MODEL)")
parser.add_argument("--version", type=int, required=True, help="grows within a run")
parser.add_argument("--run", default="update")
parser.add_argument("--timeout", type=float, default=600.0, help="seconds until it must be live (default: 600)")
options = parser.parse_args()

rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def part() -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's tensors: every so many-th of all; read when they are sent."""
    number = 0
    for path in sorted(options.checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if number % world_size == rank:
                    yield name, file.get_tensor(name)
                number += 1


def show(done: int, total: int) -> None:
    """How far this rank is."""
    if sys.stderr.isatty() and total:
        print(f"\rrank {rank}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr)


began = time.monotonic()
with Publisher(
    f"ipc://{options.runtime_dir}/front.sock", model=options.model, run=options.run, rank=rank, world_size=world_size
) as publisher:
    try:
        source = options.checkpoint if world_size == 1 else part()
        handle = publisher.publish(source, version=options.version, progress=show)
        handle.staged(
            timeout=options.timeout
        )  # the daemon holds all ranks' parts, verified; engines still serve the old
        staged = time.monotonic()
        report = handle.live(timeout=options.timeout)  # every engine serves it, or its reason not to is in the report
    except CpeError as error:
        sys.exit(f"rank {rank}: {error.message}")
live = time.monotonic()
if rank == 0:
    print(report)
    print(f"staged after {staged - began:.2f} s, live {live - staged:.2f} s later")
if report.behind:
    sys.exit(f"rank {rank}: not taken by {', '.join(report.behind)}")

"""A trainer in plain torch: it learns, and publishes its weights to a daemon now and then.

python examples/trainer.py RUNTIME_DIR
"""

import sys
import time

import torch

from cpe_daemon.publisher import Publisher

if len(sys.argv) != 2:
    sys.exit("usage: python examples/trainer.py RUNTIME_DIR   (where `cpe serve` runs: `cpe config` shows it)")

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
batch = torch.ones(1, 4)

# Numbers grow within a run, so each start of this script is a run of its own.
with Publisher(sys.argv[1], model="policy", run=f"run-{time.time():.0f}") as publisher:
    for version in range(1, 4):
        for _ in range(300):
            optimizer.zero_grad()
            model(torch.randn(32, 4)).sub(version).square().mean().backward()
            optimizer.step()

        handle = publisher.publish(model, version=version)  # the weights may change again when this returns
        print(handle.live(timeout=60))  # every engine of the node serves it now
        with torch.inference_mode():
            print(f"version {version} gives {[round(value, 4) for value in model(batch)[0].tolist()]}", flush=True)

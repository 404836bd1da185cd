"""An inference engine in plain torch: it serves, and its weights change under it. Run it beside a daemon.

python examples/torch_engine.py RUNTIME_DIR
"""

import contextlib
import sys
import threading

import torch

from inference_plugins.torch import attach

if len(sys.argv) != 2:
    sys.exit("usage: python examples/torch_engine.py RUNTIME_DIR   (where `cpe serve` runs: `cpe config` shows it)")

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
batch = torch.ones(1, 4)
pace = threading.Event()

with (
    contextlib.suppress(KeyboardInterrupt),
    attach(model, engine="my-engine", model="policy", socket=sys.argv[1]) as attachment,
):
    attachment.ready(timeout=60)  # the live version is loaded, or there is none yet
    served = ""
    while True:
        with attachment.lock, torch.inference_mode():  # an update waits for the pass, a pass for the update
            version, output = attachment.version, model(batch)
        line = f"{version or 'no version yet'} gives {[round(value, 4) for value in output[0].tolist()]}"
        if line != served:
            print(line, flush=True)
            served = line
        pace.wait(0.01)

"""A trainer of a Hugging Face model: it publishes its weights, and a vLLM server generates with them.

python examples/vllm_trainer.py RUNTIME_DIR MODEL_DIR SERVER_URL
"""

import json
import sys
import time
import urllib.request

import torch
from transformers import AutoModelForCausalLM

from cpe_daemon.publisher import Publisher

if len(sys.argv) != 4:
    sys.exit("usage: python examples/vllm_trainer.py RUNTIME_DIR MODEL_DIR SERVER_URL")
runtime_dir, model_dir, url = sys.argv[1:]


def generated() -> list[int]:
    """What the server makes of a short prompt; the first model that it serves."""
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        name = json.load(reply)["data"][0]["id"]
    body = {"model": name, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["choices"][0]["token_ids"]


model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)

# Numbers grow within a run, so each start of this script is a run of its own.
with Publisher(f"ipc://{runtime_dir}/front.sock", model="policy", run=f"run-{time.time():.0f}") as publisher:
    for version in range(1, 4):
        with torch.no_grad():  # stands for a step of yours
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

        publisher.publish(model, version=version).live(timeout=600)  # every engine of the node serves it now
        print(f"version {version} gives {generated()}", flush=True)

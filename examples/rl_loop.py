"""A small RL loop: a policy learns by REINFORCE from what a running vLLM makes of it, which is updated at each step.

python examples/rl_loop.py --make POLICY_DIR                    write a tiny policy, for the server to start with
python examples/rl_loop.py POLICY_DIR RUNTIME_DIR SERVER_URL    train it; a server with a key: set VLLM_API_KEY

The reward is the share of a rollout's tokens whose number is even. After each update the server's greedy tokens are
compared with what the policy generates here.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from cpe_daemon.publisher import Publisher

VOCABULARY, PROMPT, TOKENS, ROLLOUTS = 256, [5, 6, 7, 8], 16, 64
TIE = 0.1  # logprobs nearer than that may be in another order in the server's bfloat16


def make(directory: Path) -> None:
    """Write a policy of some 100,000 parameters, with a tokenizer as servers want one."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    words = tokenizers.models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="t0", eos_token="t1", pad_token="t2"
    ).save_pretrained(directory)


def call(url: str, body: dict[str, object] | None = None) -> dict[str, Any]:
    """Ask the server for something."""
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {os.environ.get('VLLM_API_KEY', '')}")
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def generated(url: str, **how: object) -> list[list[int]]:
    """What the server generates, by the first model that it has: lists of tokens."""
    name = call(f"{url}/v1/models")["data"][0]["id"]
    body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    return [choice["token_ids"] for choice in call(f"{url}/v1/completions", body | how)["choices"]]


def await_server(url: str, seconds: float = 600.0) -> None:
    """Wait until it takes requests: it starts when it has been given a first version."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"no server at {url} after {seconds:g} s: {error}")
            time.sleep(1)


def logprobs(policy: torch.nn.Module, rollouts: list[list[int]]) -> torch.Tensor:
    """Of each token of each rollout, given those before it: [rollouts, tokens]."""
    tokens = torch.tensor([PROMPT + rollout for rollout in rollouts])
    scores = policy(tokens).logits[:, len(PROMPT) - 1 : -1].log_softmax(-1)
    return scores.gather(-1, tokens[:, len(PROMPT) :, None]).squeeze(-1)


@torch.no_grad()
def check(served: list[int], published: dict[str, torch.Tensor], reference: torch.nn.Module) -> str:
    """Compare the server's greedy tokens with those of the weights that it was given."""
    reference.load_state_dict(published)
    here = reference.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)[0, len(PROMPT) :].tolist()
    if here == served:
        return "as the policy"
    first = next(number for number, (one, other) in enumerate(zip(here, served, strict=True)) if one != other)
    scores = reference(torch.tensor([PROMPT + here[:first]])).logits[0, -1].log_softmax(-1)
    if scores[here[first]] - scores[served[first]] > TIE:
        sys.exit(f"the server generates {served}, and the policy that was published {here}")
    return f"as the policy, but for a tie at token {first}"


def train(directory: Path, runtime_dir: Path, url: str, steps: int, rate: float) -> None:
    """Rollouts, a step of AdamW, a new version, and again."""
    torch.manual_seed(0)
    policy = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)

    with Publisher(f"ipc://{runtime_dir}/front.sock", model="policy", run=f"rl-{time.time():.0f}") as publisher:

        def publish(version: int) -> dict[str, torch.Tensor]:
            weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in policy.state_dict().items()}
            report = publisher.publish(weights, version=version).live(timeout=600)
            if report.behind:
                sys.exit(f"not taken: {report}")
            return weights

        publish(0)
        await_server(url)
        for step in range(1, steps + 1):
            began = time.monotonic()
            rollouts = generated(url, n=ROLLOUTS, temperature=1.0, seed=step)
            rewards = torch.tensor([[float(token % 2 == 0) for token in rollout] for rollout in rollouts]).mean(1)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            optimizer.zero_grad()
            (-advantages[:, None] * logprobs(policy, rollouts)).mean().backward()
            optimizer.step()
            trained = time.monotonic()
            published = publish(step)
            live = time.monotonic()
            (greedy,) = generated(url, temperature=0)
            print(
                f"step {step}: reward {rewards.mean():.3f}, rollouts and training {trained - began:.2f} s,"
                f" live after {live - trained:.2f} s, the server generates {check(greedy, published, reference)}",
                flush=True,
            )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--make", action="store_true", help="write a policy, and nothing else")
parser.add_argument("directory", type=Path, metavar="POLICY_DIR")
parser.add_argument("runtime_dir", type=Path, nargs="?", metavar="RUNTIME_DIR")
parser.add_argument("url", nargs="?", metavar="SERVER_URL")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--rate", type=float, default=3e-3, help="of learning (default: 0.003)")
options = parser.parse_args()
if options.make:
    make(options.directory)
elif options.url is None:
    parser.error("where are the daemon (RUNTIME_DIR) and the server (SERVER_URL)?")
else:
    train(options.directory, options.runtime_dir, options.url.rstrip("/"), options.steps, options.rate)

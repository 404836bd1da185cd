"""A process that uses vLLM without a server, as a trainer's rollouts do: it generates what its input asks for.

Run by vLLM's interpreter: ``python rollouts.py MODEL LLM|AsyncLLM``. Each line that it reads is how many tokens it is
to generate; its answers are the lines that begin with ``@``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

PROMPT = [5, 6, 7, 8]


def say(what: object) -> None:
    print("@" + json.dumps(what), flush=True)


def arguments(model: str) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    return {
        "model": model,
        "dtype": "bfloat16",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "weight_transfer_config": WeightTransferConfig(backend="cpe"),
    }


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def use_llm(model: str) -> None:
    from vllm import LLM

    from inference_plugins.vllm import attach

    llm = LLM(**arguments(model))
    with attach(llm) as attachment:
        say(attachment.url)
        for line in sys.stdin:
            (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling(int(line)), use_tqdm=False)
            say(list(output.outputs[0].token_ids))


async def use_async_llm(model: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from inference_plugins.vllm import attach_async

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(model)))
    with await attach_async(llm) as attachment:
        say(attachment.url)
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            number += 1
            async for output in llm.generate({"prompt_token_ids": PROMPT}, sampling(int(line)), f"r{number}"):
                last = output
            say(list(last.outputs[0].token_ids))
    llm.shutdown()


if __name__ == "__main__":
    if sys.argv[2] == "LLM":
        use_llm(sys.argv[1])
    else:
        asyncio.run(use_async_llm(sys.argv[1]))

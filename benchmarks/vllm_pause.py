"""How long a vLLM server on the CPU is paused for an update: ``python -m benchmarks.vllm_pause``.

A daemon, a real server and a publisher, each a process. A pause is measured in the server, from its reply to ``/pause``
to the call of ``/resume``. The floor is measured in the same server's worker, between the updates: vLLM's own reload of
the same model from tensors that are in memory there. The bar is 1.5 times the floor and 20 ms.

It needs the environment that ``make test-vllm`` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
import transformers

from benchmarks.arguments import positive
from benchmarks.report import compared, finish, show, spread
from benchmarks.vllm_server import ENGINE, MODEL, ON_CPU, ROOT, call_workers, pauses, server
from cpe_daemon.publisher import Publisher

LIVE_SECONDS: Final = 60.0
ALLOWED_RATIO: Final = 1.5
ALLOWED_MORE_SECONDS: Final = 0.02


def main() -> None:
    """Measure, and report."""
    options = _options()
    directory = Path(tempfile.mkdtemp(prefix="cpe-", dir="/tmp"))
    try:
        checkpoints = [_checkpoint(directory, seed, options) for seed in range(2)]
        nbytes = sum(path.stat().st_size for path in checkpoints[0].glob("*.safetensors"))
        with _daemon(directory, options.slot_bytes, 4 * nbytes), _publisher(directory) as publisher:
            publisher.publish(checkpoints[0], version=1).live(LIVE_SECONDS)
            arguments = ["--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "128", "--max-num-seqs", "4"]
            with server(
                directory,
                checkpoints[0],
                arguments,
                python=options.python,
                ranks=options.ranks,
                developer_routes=options.developer_routes,
                settings=ON_CPU,
            ) as url:
                _measure(publisher, url, checkpoints, 2, options.warm, {})
                phases: dict[str, list[float]] = {}
                floors = _measure(publisher, url, checkpoints, 2 + options.warm, options.updates, phases)
        paused = pauses(directory)[-options.updates :]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _report(options, paused, floors, phases, nbytes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_pause",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--updates", type=positive, default=20, metavar="N", help="updates to measure (default: 20)")
    parser.add_argument("--warm", type=positive, default=3, metavar="N", help="updates before these (default: 3)")
    parser.add_argument("--ranks", type=positive, default=1, metavar="N", help="tensor-parallel workers (default: 1)")
    parser.add_argument("--layers", type=positive, default=2, metavar="N", help="of the model (default: 2)")
    parser.add_argument("--hidden", type=positive, default=64, metavar="N", help="its width (default: 64)")
    parser.add_argument("--slot-bytes", default="1MiB", help="size of a slot (default: 1MiB)")
    parser.add_argument("--developer-routes", action="store_true", help="by vLLM's own routes, not by the plugin's")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="that has vLLM")
    options = parser.parse_args()
    if not options.python.exists():
        parser.error(f"there is no {options.python}; `make test-vllm` makes it")
    return options


def _checkpoint(directory: Path, seed: int, options: argparse.Namespace) -> Path:
    """Write a random Qwen3."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(32, options.hidden // 4),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = directory / f"checkpoint-{seed}"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def _measure(
    publisher: Publisher,
    url: str,
    checkpoints: list[Path],
    first: int,
    updates: int,
    phases: dict[str, list[float]],
) -> list[float]:
    """Update, and measure the floor after each; returns that, of the slowest rank, and adds rounds' phases."""
    floors = []
    for number in range(first, first + updates):
        checkpoint = checkpoints[number % 2]
        report = publisher.publish(checkpoint, version=number).live(LIVE_SECONDS)
        if report.behind:
            sys.exit(f"the server did not take an update:\n{report}")
        for name, seconds in report.engines[ENGINE].phases.items():
            phases.setdefault(name, []).append(seconds)
        path = str(checkpoint / "model.safetensors")
        floors.append(max(rank[0] for rank in call_workers(url, "cpe_floor", path, 1)))
    return floors


def _publisher(directory: Path) -> Publisher:
    return Publisher(f"ipc://{directory}/front.sock", model=MODEL, run="run", connect_timeout=LIVE_SECONDS)


@contextlib.contextmanager
def _daemon(directory: Path, slot_bytes: str, version_bytes: int) -> Iterator[None]:
    settings = {"state_dir": directory / "state", "http.listen": "", "device.gpus": 2, "device.slot_bytes": slot_bytes}
    settings["arena.size_bytes"] = (64 << 20) + version_bytes
    command = [sys.executable, "-m", "cpe_daemon", "serve", "--runtime-dir", str(directory)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    with (directory / "daemon.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        yield
    finally:
        if process.poll() is not None:
            sys.stderr.write((directory / "daemon.log").read_text(errors="replace")[-2000:])
        process.terminate()
        process.wait(60)


def _report(
    options: argparse.Namespace,
    pauses: list[float],
    floors: list[float],
    phases: Mapping[str, list[float]],
    nbytes: int,
) -> None:
    allowed = ALLOWED_RATIO * statistics.median(floors) + ALLOWED_MORE_SECONDS
    routes = "vLLM's routes for developers" if options.developer_routes else "the plugin's routes"
    show(
        f"vLLM on the CPU: {options.ranks} ranks, {options.layers} layers of width {options.hidden}, {routes}",
        ("", "median (extremes)"),
        [
            ("pause: from the reply to /pause to the call of /resume", spread(pauses)),
            ("floor: vLLM's start, load and finish in the worker", spread(floors)),
            ("allowed: 1.5 × the floor + 20 ms", f"{allowed:.3f} s"),
            *((f"the daemon's round: {name}", spread(seconds)) for name, seconds in phases.items()),
        ],
        [f"{len(pauses)} updates of {nbytes / 1e6:.1f} MB; the slowest rank's floor after each"],
    )
    more = {"device": "cpu", "ranks": options.ranks, "allowed_seconds": round(allowed, 6)}
    finish(compared("vllm_pause", nbytes=nbytes, seconds=pauses, floor_seconds=floors, **more))


if __name__ == "__main__":
    main()

"""How long a vLLM server on the CPU is paused for an update: ``python -m benchmarks.vllm_pause``.

A daemon, a real server and a publisher, each a process. A pause is measured in the server, from its reply to ``/pause``
to the call of ``/resume``. The floor is measured in the same server's worker, between the updates: vLLM's own reload of
the same model from tensors that are in memory there. The bar is 1.5 times the floor and 20 ms.

It needs the environment that ``make test-vllm`` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from benchmarks.arguments import positive
from benchmarks.report import compared, finish, show, spread
from cpe_daemon.publisher import Publisher

ROOT: Final = Path(__file__).parent.parent
START_SECONDS: Final = 400.0
LIVE_SECONDS: Final = 60.0
ALLOWED_RATIO: Final = 1.5
ALLOWED_MORE_SECONDS: Final = 0.02
_PLUGIN: Final = "cpe_meter"


def main() -> None:
    """Measure, and report."""
    options = _options()
    directory = Path(tempfile.mkdtemp(prefix="cpe-", dir="/tmp"))
    try:
        checkpoints = [_checkpoint(directory, seed, options) for seed in range(2)]
        nbytes = sum(path.stat().st_size for path in checkpoints[0].glob("*.safetensors"))
        with _daemon(directory, options.slot_bytes, 4 * nbytes), _publisher(directory) as publisher:
            publisher.publish(checkpoints[0], version=1).live(LIVE_SECONDS)
            with _server(directory, checkpoints[0], options) as url:
                _measure(publisher, url, checkpoints, 2, options.warm, {})
                (directory / "pauses").write_text("")
                phases: dict[str, list[float]] = {}
                floors = _measure(publisher, url, checkpoints, 2 + options.warm, options.updates, phases)
        pauses = [float(line) for line in (directory / "pauses").read_text().splitlines()]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _report(options, pauses, floors, phases, nbytes)


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
        for name, seconds in report.engines["vllm"].phases.items():
            phases.setdefault(name, []).append(seconds)
        path = str(checkpoint / "model.safetensors")
        ranks = _call(url, "/collective_rpc", {"method": "cpe_floor", "args": [path, 1]})["results"]
        floors.append(max(rank[0] for rank in ranks))
    return floors


def _call(url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIVE_SECONDS) as reply:
        return json.loads(reply.read() or b"null")


def _publisher(directory: Path) -> Publisher:
    return Publisher(f"ipc://{directory}/front.sock", model="policy", run="run", connect_timeout=LIVE_SECONDS)


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


@contextlib.contextmanager
def _server(directory: Path, checkpoint: Path, options: argparse.Namespace) -> Iterator[str]:
    """Run a server; gives its URL when it takes requests."""
    info = directory / "plugin" / f"{_PLUGIN}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_PLUGIN} = {_PLUGIN}:register\n")
    (info.parent / f"{_PLUGIN}.py").write_text((ROOT / "benchmarks/vllm_meter.py").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "CPE_", "PYTHON"))}
    environment = inherited | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(info.parent),
        "CPE_METER": str(directory / "pauses"),
        "CPE_ENGINES_SOCKET": str(directory / "engines.sock"),
        "CPE_ENGINE": "vllm",
        "CPE_ENGINE_URL": url,
        "CPE_MODEL": "policy",
    }
    if not options.developer_routes:
        environment["VLLM_PLUGINS"] = f"cpe,{_PLUGIN}"
    command = [str(options.python), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--model", str(checkpoint), "--skip-tokenizer-init", "--max-model-len", "128", "--dtype", "bfloat16"]
    command += ["--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port), "--middleware", f"{_PLUGIN}.Clock"]
    command += ["--tensor-parallel-size", str(options.ranks), "--weight-transfer-config", '{"backend": "cpe"}']
    log = directory / "server.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=file, stderr=file, start_new_session=True
        )
    try:
        _await(url, process, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline, pause = time.monotonic() + START_SECONDS, threading.Event()
    while True:
        with contextlib.suppress(OSError):
            _call(url, "/health")
            return
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the server did not start: {log.read_text(errors='replace')[-4000:]}")
        pause.wait(0.5)


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

"""How long a vLLM server on GPUs is paused for an update: ``python -m benchmarks.gpu.vllm``.

A real server of one engine, a daemon and a publisher, each a process; for each number of slots another daemon updates
the same server. A pause is measured in the server, from its reply to ``/pause`` to the call of ``/resume``. The floor
is the version's bytes alone, over the links of all GPUs at once, between the updates (`benchmarks.gpu.floor`).

Before, vLLM's own loader loads each of the contents that are published later: how long that takes is the second floor,
and the digests of all parameters and the tokens that it leads to are what every update has to lead to as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tokenizers
import transformers

from benchmarks.arguments import positive
from benchmarks.gpu.contents import Weights
from benchmarks.gpu.node import Setting, one_engine
from benchmarks.gpu.push import FloorProcess, Tell, gpus_of, progress
from benchmarks.host import SERVE, DaemonProcess
from benchmarks.models import MODELS
from benchmarks.report import compared, finish, ratio, rounded, show, spread
from benchmarks.vllm_server import ENGINE, MODEL, ON_CPU, ROOT, call, call_workers, pauses, server
from cpe_daemon.cli.conversation import DaemonAddress, ask_status
from cpe_daemon.demo.processes import await_daemon
from cpe_daemon.demo.signals import Interruption
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.publisher import Publisher

CONTENTS: Final = 3
"""Different ones, in turn."""
_LIVE_SECONDS: Final = 120.0
_START_SECONDS: Final = 120.0
_MIB: Final = 1 << 20
_PROMPT: Final = tuple(range(5, 21))
_TOKENS: Final = 16
_ON_GPU: Final = (
    *("--gpu-memory-utilization", "0.5"),
    *(
        "--compilation-config",
        '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}',
    ),
)
"""CUDA graphs, and no compiler, whose start takes minutes."""
_GPU_SETTINGS: Final = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""That one would be compiled at the start, for a minute and a half."""

_EPILOG: Final = """\
examples:
  python -m benchmarks.gpu.vllm --model 8b --gpus 2 --slots 3 --slots 66
  python -m benchmarks.gpu.vllm --model moe --gpus 2
  python -m benchmarks.gpu.vllm --device shm --model small --slot-mib 4     # to see that it works, on the CPU

The last line is JSON: bench, device, bytes, seconds (of each pause, with the first number of slots), floor_seconds,
ratio, loader_seconds, and rows, with the same for each number of slots."""


@dataclass(frozen=True, slots=True)
class Known:
    """What contents lead to, by vLLM's own loader."""

    digests: Sequence[str]
    tokens: Sequence[int]
    seconds: float


@dataclass(slots=True)
class Row:
    """What was measured with one number of slots."""

    slots: int
    paused: list[float] = field(default_factory=list)
    pushed: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        """For the last line."""
        return {
            "slots": self.slots,
            "paused_seconds": rounded(self.paused),
            "pushed_seconds": rounded(self.pushed),
            "floor_seconds": rounded(self.floor_seconds),
            "ratio": round(ratio(self.paused, self.floor_seconds), 4),
            "phases": {name: round(statistics.median(seconds), 6) for name, seconds in self.phases.items()},
            "loading": dict(self.loading),
        }


class Bench:
    """A server that is up, and what it is updated with.

    Args:
        options: of the command line.
        directory: for sockets and logs; its path has to be short.
        url: of the server.
        gpus: that it runs on.
        tell: called after each step.
    """

    def __init__(self, options: argparse.Namespace, directory: Path, url: str, gpus: Sequence[str], tell: Tell) -> None:
        self._options = options
        self._directory = directory
        self._url = url
        self._gpus = gpus
        self._tell = tell
        self._contents = Weights(MODELS[options.model])
        self._known: list[Known] = []

    def look_up(self) -> list[float]:
        """Have vLLM load all contents itself; returns the seconds that each took."""
        for number in range(CONTENTS):
            answers = call_workers(self._url, "cpe_load", self._options.model, number)
            seconds = max(float(answer) for answer in answers)  # vLLM writes what is no list as text
            self._known.append(Known(self._digests(), self._tokens(), seconds))
            self._tell()
        if len({tuple(known.digests) for known in self._known}) < CONTENTS:
            raise EngineError("different contents lead to the same parameters")
        return [known.seconds for known in self._known]

    def measure(self, slots: int, floor: FloorProcess) -> Row:
        """Update the server by a daemon with so many slots; every update is compared with what is known."""
        row = Row(slots)
        with self._daemon(slots) as publisher:
            for number in range(1, self._options.warm + self._options.updates + 1):
                took = self._update(publisher, number)
                self._tell()
                if number <= self._options.warm:
                    continue
                row.floor_seconds.append(floor.run())
                row.paused.append(pauses(self._directory)[-1])
                row.pushed.append(took.push_seconds)
                for name, seconds in took.engines[ENGINE].phases.items():
                    row.phases.setdefault(name, []).append(seconds)
            (engine,) = ask_status(self._address, _LIVE_SECONDS)["engines"]
            row.loading = engine.get("loading") or {}
        return row

    def _update(self, publisher: Publisher, number: int) -> Any:
        which = number % CONTENTS
        report = publisher.publish(self._contents.version(which), version=number).live(_LIVE_SECONDS)
        if report.behind:
            raise EngineError(f"the server did not take version {number}: {report}")
        known, digests, tokens = self._known[which], self._digests(), self._tokens()
        if digests != known.digests:
            raise EngineError(f"version {number}: parameters are {digests}, by vLLM's own loader {known.digests}")
        if tokens != known.tokens:
            raise EngineError(f"version {number}: tokens are {tokens}, after vLLM's own loader {known.tokens}")
        return next(iter(report.nodes.values()))

    def _digests(self) -> list[str]:
        return call_workers(self._url, "cpe_digest")

    def _tokens(self) -> list[int]:
        body = {"model": str(self._directory / "model"), "prompt": list(_PROMPT), "max_tokens": _TOKENS}
        body |= {"temperature": 0, "return_token_ids": True, "ignore_eos": True}
        tokens: list[int] = call(self._url, "/v1/completions", body)["choices"][0]["token_ids"]
        return tokens

    @property
    def _address(self) -> DaemonAddress:
        return DaemonAddress(f"ipc://{self._directory}/front.sock")

    @contextlib.contextmanager
    def _daemon(self, slots: int) -> Iterator[Publisher]:
        """Run a daemon until all the server's workers are attached to it, and on."""
        config = setting_of(self._options, self._gpus, slots).config(self._directory)
        path = self._directory / f"config-{slots}.yaml"
        path.write_text(json.dumps({**config, "state_dir": str(self._directory / f"state-{slots}")}))
        log, run = self._directory / f"daemon-{slots}.log", f"run-{slots}"
        with DaemonProcess("the daemon", [*SERVE, "--config", str(path)], log) as daemon:
            await_daemon(self._address.endpoint, [daemon], _START_SECONDS)
            self._await_engine(daemon)
            with Publisher(self._address.endpoint, model=MODEL, run=run, connect_timeout=_START_SECONDS) as publisher:
                yield publisher

    def _await_engine(self, daemon: DaemonProcess) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            daemon.check()
            workers = [
                worker for engine in ask_status(self._address, _LIVE_SECONDS)["engines"] for worker in engine["workers"]
            ]
            if len([worker for worker in workers if worker["present"]]) == len(self._gpus):
                return
            if time.monotonic() > deadline:
                raise EngineError(f"the server's workers did not come: {workers}")
            time.sleep(0.2)


def setting_of(options: argparse.Namespace, gpus: Sequence[str], slots: int) -> Setting:
    """What a daemon with so many slots has, and the floor beside it."""
    slot_bytes = int(options.slot_mib * _MIB)
    return Setting(options.device, options.model, tuple(gpus), one_engine(gpus), slots, slot_bytes)


def run(options: argparse.Namespace, directory: Path) -> None:
    """Measure, and print."""
    gpus = gpus_of(options.device, options.gpus)
    model = _write_model(directory, options.model)
    setting = setting_of(options, gpus, options.slots[0])
    arguments = [
        "--load-format",
        "dummy",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
        "--no-enable-prefix-caching",
    ]
    arguments += _ON_GPU if options.device == "cuda" else ["--enforce-eager"]
    settings = {"CPE_VLLM_START": "any", **(_GPU_SETTINGS if options.device == "cuda" else ON_CPU)}
    steps = CONTENTS + len(options.slots) * (options.warm + options.updates)
    began = time.monotonic()
    with (
        FloorProcess(setting, directory) as floor,
        server(directory, model, arguments, python=options.python, ranks=len(gpus), settings=settings) as url,
        progress(f"vLLM, {options.model}, {len(gpus)} GPUs", steps) as tell,
    ):
        started = time.monotonic() - began
        bench = Bench(options, directory, url, gpus, tell)
        loader = bench.look_up()
        rows = [bench.measure(slots, floor) for slots in options.slots]
    _report(options, rows, loader, started)


def _write_model(directory: Path, name: str) -> Path:
    """Write what a server has to know of a model whose weights it makes up, and a tokenizer that nobody reads."""
    path = directory / "model"
    path.mkdir()
    config = MODELS[name].config() | {"bos_token_id": None, "eos_token_id": 1}
    (path / "config.json").write_text(json.dumps(config))
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(config["vocab_size"])}, unk_token="t0")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="t0", eos_token="t1", pad_token="t2"
    ).save_pretrained(path)
    return path


def _report(options: argparse.Namespace, rows: Sequence[Row], loader: Sequence[float], started: float) -> None:
    nbytes = MODELS[options.model].nbytes
    show(
        f"A vLLM of {options.gpus} ranks on {options.device}, {options.model}: {nbytes / 1e9:.3f} GB",
        ("slots", "paused", "to the floor", "staged to live", "floor", *rows[0].phases),
        [
            (
                str(row.slots),
                spread(row.paused),
                f"{ratio(row.paused, row.floor_seconds):.3f}",
                spread(row.pushed),
                spread(row.floor_seconds),
                *(f"{statistics.median(seconds) * 1e3:.1f} ms" for seconds in row.phases.values()),
            )
            for row in rows
        ],
        notes=[
            f"medians of {options.updates}, with the least and the most, after {options.warm} others; after every one"
            " all parameters and buffers, and tokens, were what vLLM's own loader makes of the version, bit by bit",
            f"vLLM's own loader, from memory of the GPU: {spread(loader)}; the server started in {started:.0f} s",
            *(f"{row.slots} slots, tensors by their way: {row.loading}" for row in rows),
        ],
    )
    more = {"device": options.device, "model": options.model, "gpus": options.gpus}
    more |= {"loader_seconds": rounded(loader), "rows": [row.plain() for row in rows]}
    finish(compared("vllm", nbytes=nbytes, seconds=rows[0].paused, floor_seconds=rows[0].floor_seconds, **more))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.vllm",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = ROOT / ".venv-vllm/bin/python"
    python = here if here.exists() else Path(sys.executable)
    parser.add_argument("--device", choices=["cuda", "shm"], default="cuda", help="shm: on the CPU")
    parser.add_argument("--model", choices=sorted(MODELS), default="8b", help="whose names and shapes (8b)")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="tensor-parallel ranks (1)")
    parser.add_argument("--slots", type=positive, action="append", metavar="N", help="of each GPU; several times (3)")
    parser.add_argument("--slot-mib", type=float, default=256, metavar="MIB", help="size of a slot (256)")
    parser.add_argument("--updates", type=positive, default=8, metavar="N", help="that are measured, for each (8)")
    parser.add_argument("--warm", type=positive, default=4, metavar="N", help="updates before these (4)")
    parser.add_argument("--python", type=Path, default=python, help="that has vLLM")
    options = parser.parse_args(arguments)
    options.slots = options.slots or [3]
    with Interruption() as interruption, tempfile.TemporaryDirectory(prefix="cpe-", dir="/tmp") as directory:
        interruption.arm()
        try:
            run(options, Path(directory))
        except CpeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

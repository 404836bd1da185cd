"""Real SGLang servers. All waits have deadlines, and every server is a process group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.vllm.checkpoints import PROMPT, TOKENS, Checkpoint
from tests.vllm.servers import LIVE_SECONDS, ROOT, Daemon, Faults

PYTHON: Final = ROOT / ".venv-sglang/bin/python"
STUBS: Final = Path(__file__).parent / "stubs"
ADMIN_KEY: Final = "for the daemon"
KEY: Final = "for everybody"
"""Of servers that have some; the daemon knows the first."""
START_SECONDS: Final = 500.0
"""A server is there after 60 s on two cores, with two schedulers after 90 s."""
_PLUGIN: Final = "cpe_sglang_faults"
_OURS: Final = ("SGLANG_", "CPE_", "PYTHON")


class SglangFaults(Faults):
    """The same, for SGLang's servers."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, _PLUGIN, "sglang.srt.plugins", Path(__file__).parent / "faults.py")


class Server:
    """An SGLang server on the CPU, as the README has it, but small.

    Args:
        engine: its name.
        daemon: of its node.
        checkpoint: on its disk.
        faults: the tests' plugin.
        logs: a directory.
        ranks: tensor parallel.
        model: whose versions it takes.
        options: more of them.
        environment: more of it.
    """

    def __init__(
        self,
        engine: str,
        daemon: Daemon,
        checkpoint: Checkpoint,
        faults: Faults,
        logs: Path,
        *,
        ranks: int = 1,
        model: str = "policy",
        options: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.log = logs / f"{engine}.log"
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(ranks)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{STUBS}:{faults.directory}",
            "CPE_ENGINES_SOCKET": daemon.engines,
            "CPE_ENGINE": engine,
            "CPE_MODEL": model,
            **(environment or {}),
        }
        told = {
            "--model-path": checkpoint.path,
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--mem-fraction-static": 0.9,  # of what the host has left, which changes; the tokens are what bounds it
            "--max-total-tokens": 2048,
            "--max-running-requests": 8,
            "--host": "127.0.0.1",
            "--port": port,
            "--tp": ranks,
            **(options or {}),
        }
        flags = ["--skip-server-warmup", "--disable-overlap-schedule", "--sleep-on-idle"]
        self._command = [str(PYTHON), "-m", "sglang.launch_server", *flags]
        for option, value in told.items():
            self._command += [option, str(value)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `ready` waits for it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self.log.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ready(self) -> Server:
        """Wait until it takes requests."""
        deadline = time.monotonic() + START_SECONDS
        pause = threading.Event()
        while not self.answers("/ready"):
            if self.ended:
                pytest.fail(f"{self.engine} ended: {self.tail()}")
            if time.monotonic() > deadline:
                pytest.fail(f"{self.engine} was not there in {START_SECONDS:g} s: {self.tail()}")
            pause.wait(0.5)
        return self

    def answers(self, path: str) -> bool:
        """Whether it says yes at a route."""
        try:
            self.call(path, seconds=5)
        except (OSError, urllib.error.URLError):
            return False
        return True

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def wait(self, seconds: float) -> int:
        """Wait for its end."""
        assert self._process is not None
        return self._process.wait(seconds)

    def kill(self) -> None:
        """End it and all its workers at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)

    def generate(self, *, tokens: int = TOKENS, seconds: float = LIVE_SECONDS) -> dict[str, Any]:
        """What it says of the prompt, greedily."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
        said: dict[str, Any] = json.loads(self.call("/generate", body, seconds))
        return said

    def tokens(self) -> list[int]:
        found: list[int] = self.generate()["output_ids"]
        return found

    def call(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = LIVE_SECONDS) -> bytes:
        """Call its API: POST with a body, else GET."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            content: bytes = reply.read()
            return content


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""Real vLLM servers, and the daemon beside them. All waits have deadlines, and every server is a process group."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import pytest
import torch

from cpe_daemon.publisher import Publisher
from cpe_daemon.publisher.handle import Handle
from cpe_daemon.publisher.report import PublishReport
from tests.integration.processes import until
from tests.vllm.checkpoints import PROMPT, TOKENS, Checkpoint

ROOT: Final = Path(__file__).parent.parent.parent
PYTHON: Final = ROOT / ".venv-vllm/bin/python"
START_SECONDS: Final = 400.0
"""A server is there after 50 s on two idle cores, with two workers after 80 s."""
LIVE_SECONDS: Final = 60.0
_PLUGIN: Final = "cpe_faults"
_FAULTS: Final = Path(__file__).parent / "faults.py"
_ILLEGAL: Final = re.compile("SIGILL|[Ii]llegal instruction|exit code:? -4")


class Daemon:
    """A daemon as a user starts it. It shows servers its key.

    Args:
        runtime_dir: its sockets; short.
        state_dir: its journal.
    """

    def __init__(self, runtime_dir: Path, state_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self.front = f"ipc://{runtime_dir}/front.sock"
        self.engines = f"ipc://{runtime_dir}/engines.sock"
        self.log = state_dir / "daemon.log"
        settings = {"state_dir": state_dir, "http.listen": "", "device.gpus": 2}
        settings |= {"arena.size_bytes": "64MiB", "device.slot_bytes": "64KiB"}
        self.key = "a secret of the tests"
        self._command = [sys.executable, "-m", "cpe_daemon", "serve", "--runtime-dir", str(runtime_dir)]
        for name, value in settings.items():
            self._command += ["--set", f"{name}={value}"]
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def running(cls, state_dir: Path) -> Iterator[Self]:
        """One that is started, with sockets of its own, and that ends well."""
        runtime_dir = Path(tempfile.mkdtemp(prefix="cpe-", dir="/tmp"))
        started = cls(runtime_dir, state_dir)
        started.start()
        yield started
        started.stop()
        shutil.rmtree(runtime_dir, ignore_errors=True)

    def start(self) -> None:
        """Start it."""
        environment = {**os.environ, "CPE_VLLM_API_KEY": self.key}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)

    def stop(self) -> None:
        """End it as an operator does; it has to end well."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(60) == 0, self.log.read_text()[-2000:]

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def status(self) -> dict[str, Any]:
        """What `cpe status --json` says."""
        command = [sys.executable, "-m", "cpe_daemon", "status", "--json", "--to", self.front]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


class RoomyDaemon(Daemon):
    """A daemon with room for a larger model, and slots that take a layer of it."""

    def __init__(self, runtime_dir: Path, state_dir: Path) -> None:
        super().__init__(runtime_dir, state_dir)
        self._command += ["--set", "arena.size_bytes=128MiB", "--set", "device.slot_bytes=4MiB"]


class Trainer:
    """Publishes versions of one model, each under the next number.

    Attributes:
        live: what engines hold that took the last version that went live.
    """

    def __init__(self, daemon: Daemon, model: str) -> None:
        self._publisher = Publisher(daemon.front, model=model, run="run")
        self._number = 0
        self.live: Checkpoint | None = None

    def begin(self, tensors: Mapping[str, torch.Tensor]) -> Handle:
        """Publish any tensors."""
        self._number += 1
        return self._publisher.publish(dict(tensors), version=self._number)

    def publish(self, checkpoint: Checkpoint) -> PublishReport:
        """Publish a checkpoint, and wait until engines have it."""
        report = self.begin(checkpoint.tensors).live(timeout=LIVE_SECONDS)
        self.live = checkpoint
        return report

    def close(self) -> None:
        self._publisher.close()


class Faults:
    """Has workers fail where a test wants it, by a plugin of the tests' own that their servers load.

    Args:
        directory: of the plugin; it goes onto the servers' path.
        plugin: its name.
        group: the entry points among which the servers look for it.
        source: its code.
    """

    def __init__(
        self, directory: Path, plugin: str = _PLUGIN, group: str = "vllm.general_plugins", source: Path = _FAULTS
    ) -> None:
        self.directory = directory
        self._order = directory / "order"
        info = directory / f"{plugin}-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{plugin} = {plugin}:register\n")
        (directory / f"{plugin}.py").write_text(source.read_text())

    def order(self, engine: str, rank: int, step: str, deed: str) -> None:
        """Have one worker ``fail`` or ``hang`` at its next ``begin``, ``load``, ``make_over`` or ``finish``."""
        self._order.with_suffix(".new").write_text(json.dumps([engine, rank, step, deed]))
        self._order.with_suffix(".new").rename(self._order)

    def reached(self) -> int:
        """Wait until a worker hangs as it was ordered to; returns its process id."""
        reached = self.directory / "reached"
        return int(until(lambda: reached.exists() and reached.read_text(), "a worker hangs", LIVE_SECONDS))

    def clear(self) -> None:
        """Take the order back: what hangs goes on."""
        for name in ("order", "reached"):
            (self.directory / name).unlink(missing_ok=True)


class Server:
    """One vLLM server.

    Args:
        engine: its name.
        daemon: of its node.
        checkpoint: on its disk.
        faults: the tests' plugin.
        logs: a directory.
        ranks: tensor parallel.
        replicas: data parallel.
        model: whose versions it takes.
        own_routes: by our endpoint plugin, without vLLM's routes for developers.
        key: that it asks for; "" asks for none.
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
        replicas: int = 1,
        model: str = "policy",
        own_routes: bool = False,
        key: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self._key = key
        self.log = logs / f"{engine}.log"
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        routes = {"VLLM_PLUGINS": f"cpe,{_PLUGIN}"} if own_routes else {"VLLM_SERVER_DEV_MODE": "1"}
        self._environment = {
            **variables(engine, daemon, faults, model),
            "CPE_ENGINE_URL": self.url,
            **routes,
            **(environment or {}),
        }
        options = {
            "--model": checkpoint.path,
            "--served-model-name": "m",
            "--max-model-len": 128,
            "--dtype": "bfloat16",
            "--max-num-seqs": 4,
            "--host": "127.0.0.1",
            "--port": port,
            "--tensor-parallel-size": ranks,
            "--data-parallel-size": replicas,
            "--weight-transfer-config": '{"backend": "cpe"}',
        }
        self._command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        for option, value in options.items():
            self._command += [option, str(value)]
        if key:
            self._command += ["--api-key", key]
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
        while not self._healthy():
            if self.ended:
                if _ILLEGAL.search(self.tail()):
                    pytest.skip(f"{self.engine} ended: this CPU lacks instructions that vLLM uses")
                pytest.fail(f"{self.engine} ended: {self.tail()}")
            if time.monotonic() > deadline:
                pytest.fail(f"{self.engine} was not there in {START_SECONDS:g} s: {self.tail()}")
            pause.wait(0.5)
        return self

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

    def complete(
        self, *, tokens: int = TOKENS, seconds: float = LIVE_SECONDS, replica: int | None = None
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens after the prompt, and their logprobs; by one of the data-parallel engines, if it is named."""
        body = {"model": "m", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        body |= {"return_token_ids": True, "ignore_eos": True}
        headers = {} if replica is None else {"X-data-parallel-rank": str(replica)}
        said = json.loads(self.call("/v1/completions", body, seconds, headers))["choices"][0]
        return said["token_ids"], said["logprobs"]["token_logprobs"]

    def tokens(self) -> list[int]:
        return self.complete()[0]

    def call(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = LIVE_SECONDS,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> bytes:
        """Call its API, with its key: POST with a body, else GET."""
        data = None if body is None else json.dumps(body).encode()
        key = {"authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **key, **headers})
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            content: bytes = reply.read()
            return content

    def _healthy(self) -> bool:
        try:
            self.call("/health", seconds=5)
        except (OSError, urllib.error.URLError):
            return False
        return True


@contextlib.contextmanager
def started(*servers: Server) -> Iterator[tuple[Server, ...]]:
    """Start them all at once, which is quicker than one after the other, and end them."""
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


def variables(engine: str, daemon: Daemon, faults: Faults, model: str = "policy") -> dict[str, str]:
    """The environment of a process with a small vLLM on the CPU."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "CPE_", "PYTHON"))},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(faults.directory),
        "CPE_ENGINES_SOCKET": daemon.engines,
        "CPE_ENGINE": engine,
        "CPE_MODEL": model,
        "CPE_LEARNED": "off",  # faults are ordered after tensors, each of which has to come to the loaders
    }


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Do something beside the test."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Repeated:
    """Does something over and over beside the test, so that an update finds it under way.

    Args:
        work: what is done.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.results: list[Any] = []
        """Of what has ended."""
        self._work = work
        self._enough = threading.Event()
        self._thread = in_thread(self._run)

    def stands(self) -> bool:
        """Whether what is under way waits: nothing ends for half a second. What ended just before may still come."""
        threading.Event().wait(0.5)
        ended = len(self.results)
        threading.Event().wait(0.5)
        return len(self.results) == ended and not self._thread.done()

    def end(self, seconds: float = LIVE_SECONDS) -> list[Any]:
        """Let what is under way end, and return all results."""
        self._enough.set()
        self._thread.result(seconds)
        return self.results

    def _run(self) -> None:
        while not self._enough.is_set():
            self.results.append(self._work())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

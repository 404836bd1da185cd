"""A vLLM server for benchmarks: with a meter in it (`benchmarks.vllm_meter`), and updated by a daemon beside it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
START_SECONDS: Final = 400.0
CALL_SECONDS: Final = 120.0
ENGINE: Final = "vllm"
MODEL: Final = "policy"
ON_CPU: Final = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""Settings of a server on the CPU."""
_PLUGIN: Final = "cpe_meter"
_OF_ITS_OWN: Final = ("VLLM_", "CPE_")
"""Settings that a server is given here, and does not inherit."""


@contextlib.contextmanager
def server(
    directory: Path,
    checkpoint: Path,
    arguments: Sequence[str],
    *,
    python: Path,
    ranks: int = 1,
    developer_routes: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run a server; gives its URL when it takes requests.

    Args:
        directory: of the daemon's sockets; the server's log, and ``pauses``, with a line for each, are written there.
        checkpoint: what it serves, by the name of its directory.
        arguments: to the server, beside those for updates.
        python: that has vLLM.
        ranks: tensor-parallel workers.
        developer_routes: updated by vLLM's own routes, not by the plugin's.
        settings: more of its environment.
    """
    info = directory / "plugin" / f"{_PLUGIN}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_PLUGIN} = benchmarks.vllm_meter:register\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_ITS_OWN)}
    path = [str(info.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = inherited | {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path),
        "CPE_METER": str(directory / "pauses"),
        "CPE_ENGINES_SOCKET": str(directory / "engines.sock"),
        "CPE_ENGINE": ENGINE,
        "CPE_ENGINE_URL": url,
        "CPE_MODEL": MODEL,
        **(settings or {}),
    }
    if not developer_routes:
        environment["VLLM_PLUGINS"] = f"cpe,{_PLUGIN}"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), *arguments]
    command += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--middleware", "benchmarks.vllm_meter.Clock", "--tensor-parallel-size", str(ranks)]
    command += ["--weight-transfer-config", '{"backend": "cpe"}']
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


def call(url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Call a server's API: POST with a body, else GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=CALL_SECONDS) as reply:
        return json.loads(reply.read() or b"null")


def call_workers(url: str, method: str, *arguments: object) -> list[Any]:
    """Call a method of every worker; returns their answers, by rank."""
    answers: list[Any] = call(url, "/collective_rpc", {"method": method, "args": arguments})["results"]
    return answers


def pauses(directory: Path) -> list[float]:
    """Seconds of every pause so far, from the reply to the call that asked for it to the call that resumed."""
    noted = directory / "pauses"
    return [float(line) for line in noted.read_text().splitlines()] if noted.exists() else []


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline, pause = time.monotonic() + START_SECONDS, threading.Event()
    while True:
        with contextlib.suppress(OSError):
            call(url, "/health")
            return
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the server did not start: {log.read_text(errors='replace')[-4000:]}")
        pause.wait(0.5)

"""The README's example, as its reader runs it: a daemon, an engine and a trainer in three terminals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GIVES = re.compile(r"^(?:version |policy@run-\d+#)(\d+) gives (\[.*\])$", re.MULTILINE)
SECONDS = 60


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process of the example, killed if it does not end by itself."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CPE_")}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_example_engine_serves_what_the_example_trainer_publishes(runtime_dir: Path) -> None:
    settings = (
        f"state_dir={runtime_dir}/state",
        "arena.size_bytes=64MiB",
        "device.slot_bytes=1MiB",
        "http.listen=127.0.0.1:0",
    )
    small = [word for setting in settings for word in ("--set", setting)]
    with (
        running("-m", "cpe_daemon", "serve", "--runtime-dir", runtime_dir, *small) as daemon,
        running("examples/torch_engine.py", runtime_dir) as engine,
    ):
        assert engine.stdout is not None
        first = engine.stdout.readline()
        assert first.startswith("no version yet gives "), engine.communicate(timeout=SECONDS)

        with running("examples/trainer.py", runtime_dir) as trainer:
            out, err = trainer.communicate(timeout=SECONDS)
        assert trainer.returncode == 0, err
        published = dict(GIVES.findall(out))
        assert list(published) == ["1", "2", "3"]
        assert out.count("my-engine  updated") == 3

        served: dict[str, str] = {}
        for line in engine.stdout:
            served |= GIVES.findall(line)
            if "3" in served:
                break
        assert served == {number: published[number] for number in served}

        engine.send_signal(signal.SIGINT)
        _, err = engine.communicate(timeout=SECONDS)
        assert (engine.returncode, err) == (0, "")
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=SECONDS)
        assert daemon.returncode == 0


@pytest.mark.parametrize("name", ["torch_engine.py", "trainer.py"])
def test_example_without_its_argument_says_how_it_is_run(name: str) -> None:
    with running(f"examples/{name}") as example:
        out, err = example.communicate(timeout=SECONDS)
    assert (example.returncode, out) == (1, "")
    assert err.startswith(f"usage: python examples/{name} RUNTIME_DIR")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["torch_engine.py", "trainer.py"])
def test_readme_shows_the_example_as_it_is(name: str) -> None:
    source = (ROOT / "examples" / name).read_text()
    assert f"```python\n{source}```\n" in (ROOT / "README.md").read_text()

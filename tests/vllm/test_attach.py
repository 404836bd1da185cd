"""A vLLM that is no server takes versions in the process that uses it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.checkpoints import TOKENS, Checkpoint
from tests.vllm.servers import LIVE_SECONDS, PYTHON, START_SECONDS, Daemon, Faults, Repeated, Trainer, variables


class Rollouts:
    """A process that generates on demand (`tests/vllm/rollouts.py`)."""

    def __init__(self, kind: str, model: Path, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self._answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [str(PYTHON), str(Path(__file__).parent / "rollouts.py"), str(model), kind],
                env=environment,
                cwd=log.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ready(self) -> str:
        """Wait until it has attached; returns its address."""
        return str(self._answer(START_SECONDS))

    def generate(self, tokens: int = TOKENS) -> list[int]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        said = self._answer(LIVE_SECONDS)
        assert isinstance(said, list), self.log.read_text()[-4000:]
        return said

    def end(self) -> int:
        """Have it end as it does when there is no more to do."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(LIVE_SECONDS)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
        self._reader.join(20)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _answer(self, seconds: float) -> object:
        try:
            said = self._answers.get(timeout=seconds)
        except queue.Empty:
            said = None
        if said is None:
            pytest.fail(f"no answer: {self.log.read_text()[-4000:]}")
        return said

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                self._answers.put(json.loads(line[1:]))
            else:
                with self.log.open("a") as log:
                    log.write(line)
        self._answers.put(None)


@pytest.fixture
def processes(
    daemon: Daemon, trainer: Trainer, family: list[Checkpoint], all_faults: Faults, place: Path
) -> Iterator[dict[str, Rollouts]]:
    """An `LLM` whose engine runs in its own process, one whose does not, and an `AsyncLLM`, whose never does."""
    made = {}
    for engine, kind, elsewhere in (("here", "LLM", 0), ("elsewhere", "LLM", 1), ("async", "AsyncLLM", 1)):
        environment = variables(engine, daemon, all_faults)
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(elsewhere)
        made[engine] = Rollouts(kind, family[0].path, place / f"{engine}.log", environment)
    yield made
    for process in made.values():
        process.kill()


def test_rollouts_of_a_process_of_its_own_follow_the_trainer(
    processes: dict[str, Rollouts], trainer: Trainer, family: list[Checkpoint], faults: Faults
) -> None:
    """Before, between and after updates; a call that is under way waits for one, and ends."""
    assert trainer.live is not None
    sockets = [Path(process.ready().removeprefix("unix://")) for process in processes.values()]
    for process in processes.values():
        assert process.generate() == trainer.live.tokens
    for checkpoint in (family[2], family[0], family[1]):
        report = trainer.publish(checkpoint)
        for engine, process in processes.items():
            assert report.engines[engine].outcome == "updated"
            assert process.generate() == checkpoint.tokens

    for engine, process in processes.items():
        new = family[2] if trainer.live is not family[2] else family[0]
        faults.order(engine, 0, "load", "hang")
        calls = Repeated(functools.partial(process.generate, 120))
        handle = trainer.begin(new.tensors)
        faults.reached()
        assert calls.stands()
        faults.clear()
        handle.live(timeout=LIVE_SECONDS)
        trainer.live = new
        assert {len(tokens) for tokens in calls.end()} == {120}
        assert process.generate() == new.tokens

    assert all(path.exists() for path in sockets)
    for process in processes.values():
        assert process.end() == 0, process.log.read_text()[-4000:]
    assert not any(path.exists() for path in sockets)
    assert not trainer.publish(family[1]).behind

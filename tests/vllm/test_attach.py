"""A vLLM that is no server takes versions in the process that uses it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.vllm.checkpoints import TOKENS, Checkpoint
from tests.vllm.servers import LIVE_SECONDS, PYTHON, START_SECONDS, Daemon, Faults, Trainer, in_thread, variables


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
        self.url = str(self._answer(START_SECONDS))

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


@pytest.fixture(params=["LLM-here", "LLM-elsewhere", "AsyncLLM"])
def rollouts(
    request: pytest.FixtureRequest,
    daemon: Daemon,
    trainer: Trainer,
    family: list[Checkpoint],
    all_faults: Faults,
    place: Path,
) -> Iterator[Rollouts]:
    """An `LLM` whose engine runs in its own process, or in another one, or an `AsyncLLM`, whose always does."""
    environment = variables("rollouts", daemon, all_faults)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(request.param != "LLM-here"))
    kind = request.param.partition("-")[0]
    started = Rollouts(kind, family[0].path, place / f"{request.param}.log", environment)
    yield started
    started.kill()


def test_rollouts_of_a_process_of_its_own_follow_the_trainer(
    rollouts: Rollouts, trainer: Trainer, family: list[Checkpoint], faults: Faults
) -> None:
    """Before, between and after updates; a call that is under way waits for one, and ends."""
    assert trainer.live is not None
    assert rollouts.generate() == trainer.live.tokens
    for checkpoint in (family[2], family[0], family[1]):
        report = trainer.publish(checkpoint)
        assert report.engines["rollouts"].outcome == "updated"
        assert rollouts.generate() == checkpoint.tokens

    faults.order("rollouts", 0, "load", "hang")
    call = in_thread(lambda: rollouts.generate(120))
    handle = trainer.begin(family[2].tensors)
    faults.reached()
    assert not wait([call], 0.5).done
    faults.clear()
    handle.live(timeout=LIVE_SECONDS)
    trainer.live = family[2]
    assert len(call.result(LIVE_SECONDS)) == 120
    assert rollouts.generate() == family[2].tokens

    assert Path(rollouts.url.removeprefix("unix://")).exists()
    assert rollouts.end() == 0
    assert not Path(rollouts.url.removeprefix("unix://")).exists()
    assert not trainer.publish(family[1]).behind

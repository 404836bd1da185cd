"""A gate whose thread may go when nobody comes for it; what else it does is in test_vllm_loader."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cpe_daemon.errors import EngineError
from inference_plugins.gate import Gate

LONG, SHORT = 10.0, 0.02


def test_gate_that_nobody_awaits_lets_go_early() -> None:
    gate = Gate("SGLang", "the update")
    assert gate.hold(LONG, SHORT) == "deadline"
    with pytest.raises(EngineError, match=r"^SGLang did not enter the update within 0\.02 s$"):
        gate.await_held(SHORT)


def test_gate_that_is_awaited_holds_on() -> None:
    gate = Gate()
    with ThreadPoolExecutor() as pool:
        thread = pool.submit(gate.hold, LONG, LONG)
        gate.await_held(LONG)
        assert gate.held
        assert not thread.done()
        gate.release("finished")
        assert thread.result(LONG) == "finished"


def test_gate_that_was_awaited_before_is_to_be_awaited_again() -> None:
    gate = Gate()
    with ThreadPoolExecutor() as pool:
        thread = pool.submit(gate.hold, LONG, LONG)
        gate.await_held(LONG)
        gate.release("finished")
        assert thread.result(LONG) == "finished"
    assert gate.hold(LONG, SHORT) == "deadline"


def test_gate_is_released_while_nobody_has_awaited_it() -> None:
    gate = Gate()
    with ThreadPoolExecutor() as pool:
        thread = pool.submit(gate.hold, LONG, LONG)
        while not gate.held:
            pass
        gate.release("abandoned")
        assert thread.result(LONG) == "abandoned"

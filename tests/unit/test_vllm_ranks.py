"""Which of an engine's workers a vLLM worker is."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from cpe_daemon.errors import EngineError
from inference_plugins.vllm import ranks
from inference_plugins.vllm.ranks import CORES, note, place


def parallel(**changes: Any) -> Any:
    """One worker's configuration, of a server without data parallelism."""
    plain = {"world_size": 1, "rank": 0, "data_parallel_size": 1, "data_parallel_rank": 0, "data_parallel_index": 0}
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_worker(rank: int) -> None:
    assert place(parallel(world_size=2, rank=rank), {}) == (rank, 2)
    assert place(parallel(world_size=2, rank=rank), {CORES: "0:1"}) == (rank, 2)


def test_workers_of_data_parallel_ranks_that_believe_they_are_alone() -> None:
    """As those of a model without experts: each says rank 0 of 1."""
    workers = [parallel(data_parallel_index=index, world_size=2, rank=rank) for index in range(2) for rank in range(2)]
    assert [place(one, {CORES: "0:2"}) for one in workers] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_workers_of_data_parallel_ranks_that_share_experts() -> None:
    workers = [parallel(data_parallel_size=2, data_parallel_rank=index, world_size=2, rank=1) for index in range(2)]
    assert [place(one, {CORES: "0:2"}) for one in workers] == [(1, 4), (3, 4)]


def test_ranks_of_another_server_do_not_count() -> None:
    """With a load balancer of one's own each server has an API, and is an engine."""
    assert place(parallel(data_parallel_index=3), {CORES: "3:1"}) == (0, 1)
    assert place(parallel(data_parallel_index=3), {CORES: "2:2"}) == (1, 2)


@pytest.mark.parametrize(("index", "cores"), [(1, ""), (1, "0:1"), (2, "0:2"), (0, "1:1")])
def test_rank_that_nobody_told_of_is_refused(index: int, cores: str) -> None:
    """Otherwise it would be taken for another one."""
    with pytest.raises(EngineError, match=f"data-parallel rank {index} is not among the .* as in CPE_VLLM_CORES=0:2"):
        place(parallel(data_parallel_index=index), {CORES: cores})


@pytest.mark.parametrize("cores", ["2", "a:b", "0:", "0:0", ":2", "-1:2"])
def test_number_of_ranks_that_makes_no_sense(cores: str) -> None:
    with pytest.raises(EngineError, match="it is FIRST:COUNT, as in 0:2"):
        place(parallel(), {CORES: cores})


@pytest.mark.parametrize("kind", ["external", "hybrid"])
def test_experts_spread_over_servers_are_refused(kind: str) -> None:
    spread = parallel(data_parallel_size=2, **{f"data_parallel_{kind}_lb": True})
    with pytest.raises(EngineError, match="cannot be paused together: use one server's --data-parallel-size"):
        place(spread, {CORES: "0:1"})


# --- what the server's process tells ---------------------------------------------------------------------------------


class Arguments:
    """As vLLM's."""

    def __init__(self, **parallel: Any) -> None:
        self._parallel = SimpleNamespace(**parallel)

    def create_engine_config(self, headless: bool = False) -> Any:
        return SimpleNamespace(parallel_config=self._parallel, headless=headless)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> type[Arguments]:
    """VLLM has these, and they may be changed."""
    module = types.ModuleType("vllm.engine.arg_utils")
    vars(module)["EngineArgs"] = made = type("EngineArgs", (Arguments,), {})
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)
    return made


@pytest.mark.parametrize(
    ("terms", "cores"),
    [
        ({"data_parallel_size": 1}, "0:1"),
        ({"data_parallel_size": 2}, "0:2"),
        ({"data_parallel_size": 4, "data_parallel_external_lb": False}, "0:4"),
        (
            {
                "data_parallel_size": 4,
                "data_parallel_rank": 3,
                "data_parallel_size_local": 1,
                "data_parallel_external_lb": True,
            },
            "3:1",
        ),
        (
            {
                "data_parallel_size": 4,
                "data_parallel_rank": 2,
                "data_parallel_size_local": 2,
                "data_parallel_hybrid_lb": True,
            },
            "2:2",
        ),
    ],
)
def test_processes_are_told_which_ranks_there_are(
    arguments: type[Arguments], terms: dict[str, Any], cores: str
) -> None:
    environ = {CORES: "9:9"}
    for _ in range(2):
        note(environ)
    assert environ[CORES] == "9:9"
    assert arguments(**terms).create_engine_config(headless=True).headless
    assert environ[CORES] == cores


def test_process_without_arguments_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.engine.arg_utils", raising=False)
    environ: dict[str, str] = {}
    ranks.note(environ)
    assert environ == {}

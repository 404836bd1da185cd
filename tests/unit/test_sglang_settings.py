"""What an SGLang worker looks at before it serves: its settings, SGLang's version, and what cannot be updated."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cpe_daemon.errors import ConfigError, EngineError
from inference_plugins.sglang import compat, refusals, register
from inference_plugins.sglang.hooks import HOOKS
from inference_plugins.sglang.refusals import check_supported
from inference_plugins.sglang.settings import Settings, wanted

# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_sglang() -> None:
    environ = {"CPE_ENGINES_SOCKET": "/tmp/x", "CPE_SGLANG_START": "disk", "CPE_SGLANG_UPDATE_SECONDS": "1.5"}
    found = Settings.read({**environ, "CPE_VLLM_START": "any"})
    assert (found.socket, found.start, found.update_seconds) == ("ipc:///tmp/x/engines.sock", "disk", 1.5)
    assert (found.engine, found.model, found.url, found.start_seconds) == ("", "", "", 600)
    with pytest.raises(ConfigError, match="CPE_SGLANG_START is 'now'; it may be version, disk or any"):
        Settings.read({"CPE_SGLANG_START": "now"})
    with pytest.raises(ConfigError, match="CPE_SGLANG_START_SECONDS is 'soon'"):
        Settings.read({"CPE_SGLANG_START_SECONDS": "soon"})


@pytest.mark.parametrize(
    "name", ["CPE_ENGINES_SOCKET", "CPE_ENGINE", "CPE_MODEL", "CPE_ENGINE_URL", "CPE_SGLANG_START"]
)
def test_server_that_is_told_anything_of_ours_takes_versions(name: str) -> None:
    assert wanted({name: "x"})
    assert not wanted({name: ""})


def test_server_that_is_told_nothing_is_left_alone() -> None:
    """The plugin is found wherever the package is installed beside SGLang."""
    assert not wanted({"HOME": "/root", "CPE_VLLM_START": "any", "SGLANG_PLUGINS": "cpe"})


# --- SGLang's version ------------------------------------------------------------------------------------------------


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def find(name: str) -> str:
        if version is None or name != "sglang":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    monkeypatch.delenv(compat.UNTESTED, raising=False)


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.23rc2"])
def test_tested_version_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, version)
    assert compat.check_version() == version


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0", "1.0", None])
def test_other_version_is_refused_unless_it_is_forced(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    installed(monkeypatch, version)
    with pytest.raises(
        EngineError, match=re.escape(f"SGLang {version or 0} is not one") + ".*set CPE_SGLANG_UNTESTED=1"
    ):
        compat.check_version()
    monkeypatch.setenv(compat.UNTESTED, "1")
    assert compat.check_version() == (version or "0")


UPDATER = "sglang.srt.model_executor.model_runner_components"


def updater(monkeypatch: pytest.MonkeyPatch, **content: object) -> None:
    """Have there be SGLang's module that knows what cannot be updated."""
    made = ModuleType("weight_updater")
    vars(made).update(content)
    parts = UPDATER.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(parts[count - 1]))
    vars(sys.modules[UPDATER])["weight_updater"] = made


def test_sglang_says_itself_what_it_would_not_update(monkeypatch: pytest.MonkeyPatch) -> None:
    updater(monkeypatch, _unsupported_derived_weight_cache_error=lambda model: f"{model} is cached")
    assert compat.derived_error("m") == "m is cached"


def test_sglang_that_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.5.23")
    updater(monkeypatch)
    with pytest.raises(EngineError, match=r"SGLang 0\.5\.23 updates weights in another way"):
        compat.derived_error("m")


# --- what cannot be updated ------------------------------------------------------------------------------------------


class Quantised:
    def __init__(self, name: str, block: list[int] | None = None) -> None:
        self.name = name
        self.weight_block_size = block

    def get_name(self) -> str:
        return self.name


def model(quantised: Quantised | None = None, *, packed: bool = False) -> Any:
    made = torch.nn.Sequential(torch.nn.Linear(1, 1))
    vars(made)["quant_config"] = quantised
    vars(made[0])["use_intel_amx_backend"] = packed
    return made


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "derived_error", lambda model: None)


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize(
    "quantised",
    [None, Quantised("fp8", [128, 128]), Quantised("compressed-tensors"), Quantised("compressed_tensors")],
)
def test_what_can_be_updated(quantised: Quantised | None) -> None:
    told = {"dp_size": 1, "attn_dp_size": 4, "pp_size": 1, "nnodes": 1, "weight_cache_mode": "off", "enable_lora": None}
    told |= {"cpu_offload_gb": 0, "offload_group_size": -1, "enable_eplb": False, "elastic_ep_backend": None}
    check_supported(told, [model(quantised)])
    check_supported({}, [model(quantised)])


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"dp_size": 2}, "replicas .* are servers of their own"),
        ({"pp_size": 2}, "pipeline parallelism was not tried"),
        ({"nnodes": 2}, "a server over several nodes was not tried"),
        ({"weight_cache_mode": "shared"}, "with --weight-cache-mode other servers share the memory"),
        ({"enable_lora": True}, "with LoRA the base weights sit in other modules"),
        ({"enable_eplb": True}, "EPLB moves experts between ranks"),
        ({"elastic_ep_backend": "mooncake"}, "EPLB moves experts between ranks"),
        ({"cpu_offload_gb": 1}, "offloaded weights"),
        ({"offload_group_size": 2}, "offloaded weights"),
        ({"torchao_config": "int4wo"}, "torchao makes other tensors"),
    ],
)
def test_what_a_server_was_told_that_cannot_be_updated(told: dict[str, Any], why: str) -> None:
    with pytest.raises(EngineError, match=f"this SGLang cannot be updated live: {why}"):
        check_supported(told, [model()])


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize(
    ("made", "why"),
    [
        (model(packed=True), "on this CPU SGLang packs weights for AMX"),
        (model(Quantised("fp8")), "fp8 with one scale for a tensor loses the way to load it"),
        (model(Quantised("awq_marlin")), "weights quantised as awq_marlin were not tried"),
    ],
)
def test_model_that_cannot_be_updated(made: Any, why: str) -> None:
    with pytest.raises(EngineError, match=f"this SGLang cannot be updated live: {why}"):
        check_supported({}, [model(), made])


def test_reasons_are_given_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "derived_error", lambda model: "it keeps values")
    with pytest.raises(EngineError, match=r"live: pipeline parallelism was not tried; it keeps values$"):
        check_supported({"pp_size": 2}, [model(), model()])


# --- the entry point -------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is registered with SGLang, in a process that has a scheduler."""
    calls: list[tuple[Any, ...]] = []
    registry = ModuleType("hook_registry")
    hook_registry = SimpleNamespace(register=lambda *arguments: calls.append(arguments))
    vars(registry).update(HookRegistry=hook_registry, HookType=SimpleNamespace(AROUND="around"))
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.managers", "sglang.srt.managers.scheduler"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", registry)
    monkeypatch.setenv("CPE_ENGINES_SOCKET", "/tmp/x")
    installed(monkeypatch, "0.5.23")
    return calls


def test_hooks_go_around(registered: list[tuple[Any, ...]]) -> None:
    register.register()
    assert registered == [(target, hook, "around") for target, hook in HOOKS.items()]


def test_process_without_a_scheduler_is_not_hooked(
    registered: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler")
    register.register()
    assert registered == []


def test_server_that_is_not_to_take_versions_is_not_hooked(
    registered: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "wanted", lambda: False)
    installed(monkeypatch, "0.1")
    register.register()
    assert registered == []


def test_version_that_was_not_tested_ends_the_process(
    registered: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang only logs what else a plugin raises, and would serve what is on its disk."""
    installed(monkeypatch, "0.5.24")
    with pytest.raises(SystemExit, match=r"^cpe: SGLang 0\.5\.24 is not one"):
        register.register()
    assert registered == []

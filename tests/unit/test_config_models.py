"""Settings of single models: from a file, the environment and flags, with every problem at its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpe_daemon.config import annotated_default, effective, load_config, load_with_origins
from cpe_daemon.config.models import keeping
from cpe_daemon.core.keeping import Keeping
from cpe_daemon.errors import ConfigError

GIB = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cpe.yaml"


def test_models_have_settings_of_their_own(path: Path) -> None:
    path.write_text(
        "retention: {versions: 2}\n"
        "models:\n  org/big.v2: {quota_bytes: 200GiB}\n  small:\n    versions: 0\n  plain: {}\n"
    )
    config = load_config(path, environ={})
    assert config.models["org/big.v2"].quota_bytes == 200 * GIB
    assert keeping(config.models, config.retention.versions) == {
        "org/big.v2": Keeping(2, 200 * GIB),
        "small": Keeping(0, 0),
        "plain": Keeping(2, 0),
    }


@pytest.mark.parametrize("text", ["", "models:\n", "models: {}\n"])
def test_no_model_differs_by_default(text: str, path: Path) -> None:
    path.write_text(text)
    assert load_config(path, environ={}).models == {}


def test_environment_and_flags_name_models_as_they_are(path: Path) -> None:
    path.write_text("models:\n  Qwen3-0.6B:\n    quota_bytes: 1GiB\n    versions: 1\n")
    loaded = load_with_origins(
        path,
        environ={"CPE_MODELS__Qwen3-0.6B__QUOTA_BYTES": "2GiB", "CPE_MODELS__a__b__VERSIONS": "3"},
        overrides={"models.Qwen3-0.6B.versions": "4", "models.org/x.quota_bytes": "3GiB"},
    )
    assert {name: (model.quota_bytes, model.versions) for name, model in loaded.config.models.items()} == {
        "Qwen3-0.6B": (2 * GIB, 4),
        "a__b": (0, 3),
        "org/x": (3 * GIB, None),
    }
    said = effective(loaded)
    assert "quota_bytes: 2GiB" in said
    assert "# environment variable CPE_MODELS__Qwen3-0.6B__QUOTA_BYTES" in said
    assert "# --set models.Qwen3-0.6B.versions" in said


def test_effective_configuration_loads_back(path: Path) -> None:
    overrides = {"models.on.versions": 0, "models.a: b.quota_bytes": "1.5GiB", "models.1.quota_bytes": 5}
    loaded = load_with_origins(environ={}, overrides=overrides)
    path.write_text(effective(loaded))
    assert load_config(path, environ={}) == loaded.config


def test_all_problems_are_told_at_once_each_with_its_line(path: Path) -> None:
    path.write_text(
        "models:\n"
        "  small:\n"
        "    quota: 4\n"
        "    versions: true\n"
        "  big:\n"
        "    quota_bytes: 3G\n"
        "    nothing_like_it: 1\n"
        "  empty:\n"
        "  list: [1]\n"
        "  many: {versions: 1001}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={"CPE_MODELS__small__QUOTA_BYTES": "-1"}, overrides={"models.small": "1GiB"})
    lines = caught.value.message.splitlines()[1:]
    for expected in (
        f"{path}:3: models.small.quota: is no setting; did you mean models.small.quota_bytes?",
        f"{path}:4: models.small.versions: is a number, not true",
        f"{path}:6: models.big.quota_bytes: '3G' is ambiguous",
        f"{path}:7: models.big.nothing_like_it: is no setting",
        f"{path}:8: models.empty: is a section",
        f"{path}:9: models.list: is a section",
        f"{path}:10: models.many.versions: must be at most 1000, not 1001",
        "environment variable CPE_MODELS__small__QUOTA_BYTES: models.small.quota_bytes: must be at least 0",
        "--set models.small: names no setting",
    ):
        assert any(line.strip().startswith(expected) for line in lines), (expected, lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: [a]\n", "1: models: must have names below it"),
        ("models: 3\n", "1: models: must have names below it"),
        ('models:\n  "": {versions: 1}\n', "2: models"),
        ("modles:\n  a: {versions: 1}\n", "1: modles: is no setting; did you mean models?"),
    ],
)
def test_what_is_no_map_of_models_is_refused(text: str, problem: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})
    assert f"{path}:{problem}" in caught.value.message


@pytest.mark.parametrize("variable", ["CPE_MODELS__a__QUOTA", "CPE_MODELS__VERSIONS", "CPE_MODELS____VERSIONS"])
def test_variable_that_names_no_setting_of_a_model_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}: names no setting"):
        load_config(environ={variable: "1"})


def test_flag_for_all_models_names_their_settings() -> None:
    with pytest.raises(ConfigError, match=r"set models\.NAME\.quota_bytes, models\.NAME\.versions"):
        load_config(environ={}, overrides={"models": "x"})


def test_annotated_default_shows_what_a_model_may_have(path: Path) -> None:
    """Uncommented, the example is a configuration."""
    lines = annotated_default().splitlines()
    start = lines.index("# models:")
    example = lines[start : lines.index("", start)]
    assert "#     quota_bytes: 0" in example
    text = "\n".join(line.removeprefix("# ") for line in example)
    path.write_text(text.replace("versions:", "versions: 3"))
    assert load_config(path, environ={}).models["NAME"].versions == 3

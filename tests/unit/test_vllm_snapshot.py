"""Where the files are that vLLM loaded, for a model that is known by its name on a hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from inference_plugins.vllm.snapshot import directory, shapes

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(place: Path, name: str = "some/model") -> Path:
    """As a hub's client keeps what it downloads; returns where the files are."""
    root = place / f"models--{name.replace('/', '--')}"
    files = root / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    save_file({"w": torch.zeros(2, 3)}, files / "model.safetensors")
    return files


def given(model: str, place: Path, revision: str | None = None) -> tuple[SimpleNamespace, SimpleNamespace]:
    return SimpleNamespace(model=model, revision=revision), SimpleNamespace(download_dir=str(place))


def find(model: str, place: Path, revision: str | None = None) -> str:
    return directory(*given(model, place, revision))


def test_directory_is_itself(tmp_path: Path) -> None:
    assert find(str(tmp_path), tmp_path) == str(tmp_path)


def test_name_on_a_hub_is_where_its_files_were_kept(tmp_path: Path) -> None:
    files = cache(tmp_path)
    assert find("some/model", tmp_path) == str(files)
    assert find("some/model", tmp_path, COMMIT) == str(files)
    assert shapes(*given("some/model", tmp_path)) == {"w": (2, 3)}


@pytest.mark.parametrize("name", ["some/other", "no such/name/at all", ""])
def test_name_of_which_nothing_is_here(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(cache(tmp_path))  # other files are here
    assert find(name, tmp_path) == ""
    assert shapes(*given(name, tmp_path)) == {}
    assert "shapes are not compared" in caplog.text


def test_revision_that_is_not_here(tmp_path: Path) -> None:
    cache(tmp_path)
    assert find("some/model", tmp_path, "v2") == ""


def test_client_of_the_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    cache(tmp_path)
    assert find("some/model", tmp_path) == ""

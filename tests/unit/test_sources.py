"""What can be published, what is refused and with which words, and how checkpoints are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cpe_daemon.core.types import Shard
from cpe_daemon.errors import ManifestError
from cpe_daemon.publisher.sources import Contribution, Pairs, Source, open_source
from tests.unit.tensor_zoo import DTYPES, bytes_of, tensor_of, zoo


def opened(source: Source) -> Contribution:
    contribution = open_source(source)
    assert isinstance(contribution, Contribution)
    return contribution


def names(contribution: Contribution) -> list[str]:
    return [shard.name for shard in contribution.shards]


# --- sources in memory -----------------------------------------------------------------------------------------------


def test_mapping_keeps_order_and_tensors() -> None:
    tensors = zoo()
    contribution = opened(tensors)
    assert names(contribution) == list(tensors)
    assert all(mine is theirs for mine, theirs in zip(contribution.tensors, tensors.values(), strict=True))
    assert all(offset % 256 == 0 for offset in contribution.layout.offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shard_names_torchs_dtype(dtype: str) -> None:
    assert opened({"x": tensor_of(dtype, 2, 3)}).shards == [Shard("x", dtype, (2, 3))]


def test_list_of_pairs_is_held_by_reference() -> None:
    tensor = torch.ones(3)
    assert opened([("a", tensor), ("b", tensor)]).tensors == [tensor, tensor]


def test_iterator_is_consumed_once_and_late() -> None:
    started = []

    def pairs() -> Iterator[tuple[str, Tensor]]:
        started.append(True)
        yield "a", torch.ones(1)

    found = open_source(pairs())
    assert isinstance(found, Pairs)
    assert not started
    assert [name for name, _ in found] == ["a"]


def test_mapping_view_is_an_iterable_too() -> None:
    found = open_source({"a": torch.ones(1)}.items())
    assert isinstance(found, Pairs)


def test_module_gives_its_state_dict_with_tied_weights_under_each_name() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    assert names(opened(Tied())) == ["kept", "embed.weight", "head.weight"]


class Marked(Tensor):
    """A subclass that keeps its bytes where any tensor does."""


def test_plain_subclass_is_published() -> None:
    assert names(opened({"a": torch.ones(2).as_subclass(Marked)})) == ["a"]


# --- what is refused -------------------------------------------------------------------------------------------------


class DTensor(Tensor):
    """Named as torch's, and like it a wrapper without bytes of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


class Wrapper(DTensor):
    """Another one."""


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


REFUSED: dict[str, tuple[Any, str]] = {
    "not a tensor": (3, "x is not a tensor but a int"),
    "an array": ([1.0], "x is not a tensor but a list"),
    "meta": (torch.empty(2, device="meta"), "x is on the meta device: it has no bytes"),
    "sparse": (torch.eye(2).to_sparse(), r"x is torch.sparse_coo, not dense: publish its to_dense\(\)"),
    "opaque": (torch.eye(2).to_mkldnn(), "x is torch._mkldnn, not dense"),
    "distributed": (torch.ones(2).as_subclass(DTensor), r"x is a DTensor, .*: publish its full_tensor\(\)"),
    "wrapped": (torch.ones(2).as_subclass(Wrapper), "x is a Wrapper, which is not supported: give a plain tensor"),
    "lazy": (torch.nn.LazyLinear(2).weight, "x is not initialised"),
    "odd dtype": (torch.zeros(2, dtype=torch.bits8), "x has the dtype torch.bits8, which is not supported"),
}


@pytest.mark.parametrize(("value", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("wrap", [lambda v: {"x": v}, lambda v: [("x", v)], lambda v: iter([("x", v)])])
def test_source_refuses(value: Any, reason: str, wrap: Any) -> None:
    with pytest.raises(ManifestError, match=reason):
        list(open_source(wrap(value)))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_source_refuses_quantised_tensors() -> None:
    with pytest.raises(ManifestError, match="x is a quantised tensor"):
        open_source({"x": quantised()})


def test_a_real_dtensor_is_refused() -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    fields = vars(distributed.DTensor)
    assert fields["__torch_dispatch__"] is not Tensor.__torch_dispatch__
    assert distributed.DTensor.__name__ == DTensor.__name__


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([("a", torch.ones(1)), ("b", torch.ones(1)), ("a", torch.ones(1))], "tensor a is given twice"),
        (iter([("a", torch.ones(1)), ("a", torch.ones(1))]), "tensor a is given twice"),
        ({3: torch.ones(1)}, "a tensor's name must be a str, not 3"),
        ({"": torch.ones(1)}, "tensor name of 0 characters"),
        ({"n" * 2000: torch.ones(1)}, "tensor name of 2000 characters"),
        ([torch.ones(1)], "expected pairs of name and tensor, found a Tensor"),
        ([("a", torch.ones(1), 3)], "expected pairs"),
        (["ab"], "expected pairs of name and tensor, found a str"),
        (torch.ones(2), "expected pairs of name and tensor, found a Tensor"),
        (7, "a int cannot be published"),
        (None, "a NoneType cannot be published"),
    ],
)
def test_source_refuses_contradictions(source: Any, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        list(open_source(source))  # type: ignore[arg-type]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(path: Path, **files: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    return path


def index(path: Path, weight_map: object) -> Path:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


ONE, TWO = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"c": torch.arange(5)}


def test_file_gives_what_was_saved(tmp_path: Path) -> None:
    refused_by_the_format = {"complex32", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz"}
    tensors = {dtype: tensor_of(dtype, 4, 6) for dtype in DTYPES if dtype not in refused_by_the_format}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", str(tmp_path / "x.safetensors"), tmp_path):
        contribution = opened(path)
        assert {n: bytes_of(t) for n, t in zip(names(contribution), contribution.tensors, strict=True)} == {
            name: bytes_of(tensor) for name, tensor in tensors.items()
        }
        assert {shard.name: shard.dtype for shard in contribution.shards}["bfloat16"] == "bfloat16"


def test_directory_gives_all_files(tmp_path: Path) -> None:
    checkpoint(tmp_path, one=ONE, two=TWO)
    assert sorted(names(opened(tmp_path))) == ["a", "b", "c"]


def test_index_says_which_files_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, one=ONE, two=TWO, consolidated=ONE | TWO)
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    assert sorted(names(opened(tmp_path))) == ["a", "b", "c"]


def test_checkpoint_is_not_read_before_it_is_published(tmp_path: Path) -> None:
    save_file({"big": torch.ones(16 << 20, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    contribution = opened(tmp_path)
    mapped = contribution.tensors[0].data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [(line.split()[0].split("-"), line) for line in maps]
    (line,) = [line for (low, high), line in spans if int(low, 16) <= mapped < int(high, 16)]
    assert line.endswith("x.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors", "x": "two.safetensors"}, "lacks x, which the index says"),
        ({"a": "one.safetensors"}, "holds b, which the index does not say"),
        ({"a": "none.safetensors"}, "cannot read .*none.safetensors"),
        ({"a": "../one.safetensors"}, "not a file beside it"),
        ({"a": "/etc/passwd"}, "not a file beside it"),
        ({"a": ""}, "not a file beside it"),
        ({"a": 3}, "is no index"),
        ("nothing", "is no index"),
    ],
)
def test_index_that_contradicts_the_files_is_refused(tmp_path: Path, weight_map: object, reason: str) -> None:
    index(checkpoint(tmp_path, one=ONE, two=TWO), weight_map)
    with pytest.raises(ManifestError, match=reason):
        open_source(tmp_path)


def test_name_in_two_files_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, one=ONE, two=ONE)
    with pytest.raises(ManifestError, match="is given twice"):
        open_source(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 7, b"\xff" * 64, b"{}"])
def test_damaged_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(damage)
    with pytest.raises(ManifestError, match=r"cannot read .*x\.safetensors"):
        open_source(tmp_path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ManifestError, match="cannot read"):
        open_source(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors", "."])
def test_absent_checkpoint_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError, match=r"cannot read|holds no"):
        open_source(tmp_path / path)


def test_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff{")
    with pytest.raises(ManifestError, match="is no index"):
        open_source(tmp_path)


def test_publisher_imports_little() -> None:
    import subprocess

    code = (
        "import cpe_daemon.publisher, sys\n"
        "print(*{'structlog', 'pydantic', 'click', 'rich', 'yaml', 'prometheus_client', 'uvloop'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []

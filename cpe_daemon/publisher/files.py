"""Checkpoints in safetensors: one file, or a directory of them with or without an index. Never any other format.

Tensors are views of the mapped files: opening a checkpoint reads only its headers, and its bytes are read while they
are published. The files must not change until then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpe_daemon.errors import ManifestError

INDEX_NAME: Final = "model.safetensors.index.json"


class _Index(msgspec.Struct):
    """What is used of an index: which file holds which tensor."""

    weight_map: dict[str, str]


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint, file by file.

    With an index, exactly the files that it names are read, and they must hold exactly the tensors that it says.

    Raises:
        ManifestError: there is no checkpoint, a file is missing or damaged, or file and index contradict each other.
    """
    if not path.is_dir():
        yield from _read_file(path, None)
        return
    index = path / INDEX_NAME
    if index.is_file():
        for file, names in _indexed(index).items():
            yield from _read_file(path / file, names)
        return
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ManifestError(f"{path} holds no *.safetensors file")
    for found in files:
        yield from _read_file(found, None)


def _indexed(index: Path) -> Mapping[str, set[str]]:
    """The names by file, in the index's order of files."""
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{index} is no index of safetensors: {error}") from None
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not file or Path(file).name != file:
            raise ManifestError(f"{index} says that {name} is in {file!r}, which is not a file beside it")
        files.setdefault(file, set()).add(name)
    return files


def _read_file(path: Path, expected: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's tensors, in its order; ``expected`` are their names according to an index."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ManifestError(f"cannot read {path}: {error}") from None
        if expected is not None:
            _compare(path, set(names), expected)
        for name in names:
            try:
                tensor = file.get_tensor(name)
            except (AttributeError, OSError, SafetensorError, TypeError) as error:
                raise ManifestError(f"cannot read tensor {name} of {path}: {error}") from None
            yield name, tensor


def _compare(path: Path, found: set[str], expected: set[str]) -> None:
    for names, problem in (
        (expected - found, "lacks {names}, which the index says it holds"),
        (found - expected, "holds {names}, which the index does not say"),
    ):
        if names:
            some = ", ".join(sorted(names)[:10])
            raise ManifestError(f"{path} {problem.format(names=some)}")

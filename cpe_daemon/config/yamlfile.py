"""A YAML file as a layer of settings, every value with its line. Plain values only: nothing in it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from cpe_daemon.config.sources import Key, Layer, Problem

_MAX_DEPTH: Final = 8
"""Deeper than any setting lies, and an end for an anchor that holds itself."""

_TAG: Final = "tag:yaml.org,2002:"
_SCALARS: Final = frozenset(_TAG + kind for kind in ("null", "bool", "int", "float", "str"))


def read_yaml(path: Path) -> Layer:
    """Read a file; whatever is wrong with it is in the layer's problems, and the rest in its values."""
    layer = Layer()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text in UTF-8"
        layer.problems.append(Problem(str(path), "", f"cannot be read: {reason}"))
        return layer
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        detail = ", ".join(part for part in (error.context, error.problem) if part)
        layer.problems.append(Problem(where, "", f"is not YAML: {detail}"))
    except yaml.YAMLError as error:
        layer.problems.append(Problem(str(path), "", f"is not YAML: {' '.join(str(error).split())}"))
    else:
        if root is not None and not _is_empty(root):
            _Reader(path, layer).read(root)
    return layer


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"


class _Reader:
    """Turns YAML nodes into plain values, and keeps their lines."""

    def __init__(self, path: Path, layer: Layer) -> None:
        self._path = path
        self._layer = layer
        self._constructor = yaml.SafeLoader("")

    def read(self, root: yaml.Node) -> None:
        if isinstance(root, yaml.MappingNode):
            self._layer.values = self._mapping(root, ())
        else:
            self._report(root, (), "holds no settings; write lines such as 'node: gpu-17'")

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self._report(name_node, key, "has a name that is no text")
                continue
            name = str(name_node.value)
            at: Key = (*key, name)
            if name in values:
                self._report(name_node, at, f"is set twice (first at line {self._line(at)}); remove one")
                continue
            self._layer.origins[at] = f"{self._path}:{name_node.start_mark.line + 1}"
            values[name] = {} if not key and _is_empty(value_node) else self._value(value_node, at)
        return values

    def _value(self, node: yaml.Node, key: Key) -> Any:
        if len(key) > _MAX_DEPTH:
            self._report(node, key[:1], "is nested too deeply")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*key, place)) for place, item in enumerate(node.value)]
        return self._scalar(node, key)

    def _item(self, node: yaml.Node, key: Key) -> Any:
        self._layer.origins[key] = f"{self._path}:{node.start_mark.line + 1}"
        return self._value(node, key)

    def _scalar(self, node: yaml.Node, key: Key) -> Any:
        """Return a scalar's value; a date stays the text that was written."""
        if node.tag == f"{_TAG}timestamp":
            return str(node.value)
        if node.tag not in _SCALARS:
            self._report(node, key, f"has the tag {node.tag.replace(_TAG, '!!')}, which nothing here needs; remove it")
            return str(node.value)
        try:
            return self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self._report(node, key, f"is not a value: {error}")
            return None

    def _line(self, key: Key) -> str:
        return self._layer.origins[key].rpartition(":")[2]

    def _report(self, node: yaml.Node, key: Key, text: str) -> None:
        where = f"{self._path}:{node.start_mark.line + 1}"
        self._layer.problems.append(Problem(where, ".".join(map(str, key)), text))

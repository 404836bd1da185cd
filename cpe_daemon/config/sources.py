"""Where settings come from, before anybody judges them: a YAML file, the environment, flags.

They are laid over one another in a `Layer`: a tree of raw values, with the place that each was written at.
The later source wins, setting by setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

ENV_PREFIX: Final = "CPE_"
ENV_SEPARATOR: Final = "__"

NAME: Final = "NAME"
"""In the path of a setting: any name, such as a model's, as it is. In a flag it may have dots of its own."""

DEFAULT: Final = "default"
"""Where a setting comes from that nobody wrote."""

Key = tuple[str | int, ...]
"""Path of a setting; a number is a place in a list."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it was written, which setting it is about, and what to do."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)


@dataclass(slots=True)
class Layer:
    """Raw values and where each was written."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def set(self, path: tuple[str, ...], value: object, where: str) -> None:
        """Set one setting, and forget what an earlier layer said of it."""
        tree = self.values
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
            if not isinstance(tree, dict):
                return  # what stands there is no section: that is reported, and this would hide it
        tree[path[-1]] = value
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = where

    def where(self, key: Key) -> str:
        """Return where ``key``, or the nearest thing around it, was written; `DEFAULT` if nowhere."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return DEFAULT


def lay_environment(layer: Layer, environ: Mapping[str, str], known: Iterable[tuple[str, ...]]) -> None:
    """Lay ``CPE_<SECTION>__<NAME>`` over ``layer``.

    Other variables that begin with CPE_ and hold no ``__`` are left alone (a Kubernetes service called cpe
    makes some), unless they are a setting's with one underscore missing.
    """
    names = {env_name(path): path for path in known}
    slips = {name.replace(ENV_SEPARATOR, "_"): name for name in names}
    for variable in sorted(environ):
        where = f"environment variable {variable}"
        if path := _path(variable, names, ENV_SEPARATOR):
            layer.set(path, environ[variable], where)
        elif variable in slips:
            layer.problems.append(Problem(where, "", f"names no setting; did you mean {slips[variable]}?"))
        elif variable.startswith(ENV_PREFIX) and ENV_SEPARATOR in variable:
            layer.problems.append(Problem(where, "", f"names no setting{did_you_mean(variable, names)}"))


def lay_flags(layer: Layer, overrides: Mapping[str, object], known: Iterable[tuple[str, ...]]) -> None:
    """Lay dotted overrides, such as ``{"device.slots": 4}``, over ``layer``."""
    names = {".".join(path): path for path in known}
    for dotted, value in overrides.items():
        where = f"--set {dotted}"
        if path := _path(dotted, names, "."):
            layer.set(path, value, where)
        elif inside := [name for name in names if name.startswith(f"{dotted}.")]:
            layer.problems.append(Problem(where, "", f"names a section; set {', '.join(inside)}"))
        else:
            layer.problems.append(Problem(where, "", f"names no setting{did_you_mean(dotted, names)}"))


def _path(written: str, names: Mapping[str, tuple[str, ...]], separator: str) -> tuple[str, ...] | None:
    """The path that somebody has written, with whatever stands for `NAME` filled in; None if there is none like it."""
    for name, path in names.items():
        before, anything, after = name.partition(f"{separator}{NAME}{separator}")
        if anything and written.startswith(before + separator) and written.endswith(separator + after):
            filled = written[len(before + separator) : -len(separator + after)]
            if filled:
                return tuple(filled if part == NAME else part for part in path)
    return names.get(written)


def env_name(path: tuple[str, ...]) -> str:
    """Return the environment variable of a setting."""
    return ENV_PREFIX + ENV_SEPARATOR.join(path).upper()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name that looks most like ``name``, or nothing."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    tails = [candidate for candidate in candidates if candidate.rpartition(".")[2] == name.rpartition(".")[2]]
    best = next(iter(tails if len(tails) == 1 else close), "")
    return f"; did you mean {best}?" if best else ""

"""Lay the sources over one another, judge the result, and say everything that is wrong with it at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cpe_daemon.config.model import Config, settings
from cpe_daemon.config.sources import DEFAULT, NAME, Key, Layer, Problem, did_you_mean, lay_environment, lay_flags
from cpe_daemon.config.units import format_bytes, format_seconds
from cpe_daemon.config.yamlfile import read_yaml
from cpe_daemon.errors import ConfigError

_SENTENCES: Final[Mapping[str, str]] = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must have names below it, with settings below each",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "path_type": "must be a path",
    "string_too_short": "must not be empty",
    "string_type": "must be text; write it in quotes",
    "tuple_type": "must be a list, such as [a, b]",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and for every setting that is not at its default the place that set it."""

    config: Config
    layer: Layer


def load_config(
    path: Path | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """Return the configuration: defaults < the YAML file < ``CPE_*`` in ``environ`` < ``overrides``.

    Args:
        path: of the YAML file; None for none.
        environ: None for this process's environment.
        overrides: flags, by dotted name: ``{"device.slots": 4}``. Strings are read as in the environment.

    Raises:
        ConfigError: lists every problem, one a line, each with the place it was written at and the mend.
    """
    return load_with_origins(path, environ=environ, overrides=overrides).config


def load_with_origins(
    path: Path | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Loaded:
    """`load_config`, with the place that each setting came from.

    Raises:
        ConfigError: as `load_config` does.
    """
    known = settings()
    layer = read_yaml(Path(path)) if path is not None else Layer()
    lay_environment(layer, os.environ if environ is None else environ, known)
    lay_flags(layer, overrides or {}, known)
    problems = list(layer.problems)
    try:
        config = Config.model_validate(layer.values)
    except ValidationError as error:
        problems += [_problem(layer, entry) for entry in error.errors(include_url=False)]
    if problems:
        raise ConfigError(_listed(problems))
    return Loaded(config, layer)


def _listed(problems: list[Problem]) -> str:
    """Join problems, without repeating what two checks found at one place."""
    lines = list(dict.fromkeys(str(problem) for problem in sorted(problems, key=_place)))
    if len(lines) == 1:
        return lines[0]
    return "\n  ".join([f"{len(lines)} problems in the configuration:", *lines])


def _place(problem: Problem) -> tuple[bool, int]:
    """Order problems as they stand in the file; those from elsewhere follow, as they were found."""
    line = problem.where.rpartition(":")[2]
    return (False, int(line)) if line.isdigit() else (True, 0)


def _problem(layer: Layer, entry: ErrorDetails) -> Problem:
    """Say one of pydantic's findings in the words of somebody who writes a configuration."""
    key: Key = tuple(entry["loc"])
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
    where = layer.where(key)
    if where == DEFAULT:
        where = ""  # nobody wrote it, and so it is wrong
    return Problem(where, "" if where == f"--set {dotted}" else dotted, _sentence(key, entry))


def _sentence(key: Key, entry: ErrorDetails) -> str:
    kind, context, got = entry["type"], entry.get("ctx", {}), entry["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown(key)
    if kind == "model_type":
        return f"is a section; write its settings below it, indented (got {got!r})"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"must be {'one of ' if ',' in choices else ''}{choices}{_got(got)}"
    if kind in {"greater_than_equal", "less_than_equal"}:
        word, bound = ("least", context["ge"]) if kind == "greater_than_equal" else ("most", context["le"])
        return f"must be at {word} {_quantity(key, bound)}{_got(got)}"
    return _SENTENCES.get(kind, entry["msg"]) + _got(got)


def _got(value: object) -> str:
    return f", not {value!r}"


def _quantity(key: Key, value: Any) -> str:
    """Write a bound in the unit that the setting's name promises."""
    name = str(key[-1])
    if name.endswith("_bytes"):
        return format_bytes(value)
    return format_seconds(value) if name.endswith("_seconds") else str(value)


def _unknown(key: Key) -> str:
    """Name the setting that was probably meant, or else those that there are."""
    dotted = ".".join(map(str, key))
    names = [
        ".".join(path).replace(f".{NAME}.", f".{key[1]}.") if len(key) > 1 else ".".join(path) for path in settings()
    ]
    sections = sorted({name.partition(".")[0] for name in names})
    guess = did_you_mean(dotted, names) if len(key) > 1 else did_you_mean(dotted, [*sections, *names])
    if guess:
        return f"is no setting{guess}"
    section = ".".join(map(str, key[: max(1, len(key) - 1)])) + "."
    siblings = [name.removeprefix(section) for name in names if name.startswith(section)]
    return f"is no setting; there are {', '.join(siblings if len(key) > 1 else sections)}"

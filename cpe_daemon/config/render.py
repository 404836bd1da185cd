"""Settings as YAML for people: all with their meaning, or those in effect with the place each came from."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from cpe_daemon.config.load import Loaded
from cpe_daemon.config.model import Config
from cpe_daemon.config.models import named_section
from cpe_daemon.config.section import Section
from cpe_daemon.config.sources import NAME
from cpe_daemon.config.units import format_bytes, format_seconds

_WIDTH: Final = 100
_YAML_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_HEADER: Final = """\
Every setting of cpe-daemon with its default, as `cpe config --default` prints it.
A file needs only what differs; `cpe config --config FILE` checks one and shows the result.

Precedence: the flag --set SECTION.NAME=VALUE, then the environment (CPE_<SECTION>__<NAME>, such as
CPE_DEVICE__SLOTS=4 or CPE_NODE=gpu-17), then the file, then the default. A name that may be any,
such as a model's, is written as it is: CPE_MODELS__NAME__VERSIONS=2, --set models.NAME.versions=2.

Sizes are bytes, or have a unit: 256MiB, 1.5GiB, 2GB. Durations are seconds, or have a unit: 500ms,
30s, 5m, 1h. In flags and in the environment a list is JSON, ["a", "b"], or has commas between: a,b."""


def annotated_default() -> str:
    """Return a YAML file of all settings at their defaults, explained; computed defaults are left out."""
    lines = list(_comment(_HEADER, ""))
    for name, field in Config.model_fields.items():
        lines.append("")
        section = field.annotation
        if named := named_section(section):
            lines += _any_name(name, field, named)
            continue
        if not (isinstance(section, type) and issubclass(section, Section)):
            lines += _comment(field.description or "", "")
            lines.append(f"# {name}:")
            continue
        lines += _comment(inspect.getdoc(section) or "", "")
        lines.append(f"{name}:")
        for inner, entry in section.model_fields.items():
            lines += _comment(f"{entry.description}{_bounds(inner, entry)}", "  ")
            known = entry.default_factory is None
            lines.append(f"  {inner}: {_written(inner, entry.default)}" if known else f"  # {inner}:")
    return "\n".join(lines) + "\n"


def effective(loaded: Loaded) -> str:
    """Return the settings in effect as YAML; those not at their default say where they were set."""
    lines: list[str] = []
    for name in Config.model_fields:
        value = getattr(loaded.config, name)
        if isinstance(value, Section):
            lines.append(f"{name}:")
            inners = type(value).model_fields
            lines += [_line(loaded, (name, inner), getattr(value, inner), "  ") for inner in inners]
        elif isinstance(value, dict):
            lines += _named_lines(loaded, name, value)
        else:
            lines.append(_line(loaded, (name,), value, ""))
    return "\n".join(lines) + "\n"


def _any_name(name: str, field: Any, section: type[Section]) -> Iterator[str]:
    """A section that there may be under each of any names: none by default, and one shown in comments."""
    yield from _comment(field.description or "", "")
    yield f"# {name}:"
    yield f"#   {NAME}:"
    for inner, entry in section.model_fields.items():
        yield from _comment(f"{entry.description}{_bounds(inner, entry)}", "#     ")
        yield f"#     {inner}:" + ("" if entry.default is None else f" {_written(inner, entry.default)}")


def _named_lines(loaded: Loaded, name: str, sections: dict[str, Section]) -> Iterator[str]:
    """The sections of each name, without what was left to the default."""
    yield f"{name}:"
    for key, section in sections.items():
        yield f"  {_written('', key)}:"
        for inner in type(section).model_fields:
            if (value := getattr(section, inner)) is not None:
                yield _line(loaded, (name, key, inner), value, "    ")


def _line(loaded: Loaded, path: tuple[str, ...], value: object, indent: str) -> str:
    line = f"{indent}{path[-1]}: {_written(path[-1], value)}"
    where = loaded.layer.origins.get(path)
    return f"{line:<48} # {where}" if where else line


def _comment(text: str, indent: str) -> Iterator[str]:
    for paragraph in text.split("\n"):
        wrapped = textwrap.wrap(paragraph, _WIDTH - len(indent)) or [""]
        yield from (f"{indent}# {line}".rstrip() for line in wrapped)


def _bounds(name: str, field: Any) -> str:
    """Say which values are allowed, where that is not a matter of course."""
    if get_origin(field.annotation) is Literal:
        choices = get_args(field.annotation)
        return f" One of {', '.join(choices)}." if len(choices) > 1 else ""
    if name.endswith("_seconds"):
        return ""  # the section says it for all
    least = next((entry.ge for entry in field.metadata if hasattr(entry, "ge")), None)
    most = next((entry.le for entry in field.metadata if hasattr(entry, "le")), None)
    if least is None or most is None:
        return ""
    return f" {_written(name, least)} to {_written(name, most)}."


def _written(name: str, value: Any) -> str:
    """Write a value as YAML that reads back as the same."""
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_seconds"):
        return format_seconds(value)
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if isinstance(value, Path):
        return json.dumps(str(value))
    if isinstance(value, str):
        return value if value.isidentifier() and value.lower() not in _YAML_WORDS else json.dumps(value)
    return json.dumps(value)

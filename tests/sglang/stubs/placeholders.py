"""Stands in for libraries that a CPU-only host cannot have, and that SGLang imports all the same.

Everything that is looked up in such a module, or in a module below it, is `Placeholder`, which can be subclassed, made,
and used to decorate; none of it is called for a text model on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Endless(type):
    def __getattr__(cls, name: str) -> Any:
        return _named(name)


class Placeholder(metaclass=_Endless):
    """Any class, function or constant."""

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __call__(self, *arguments: Any, **named: object) -> Any:
        return arguments[0] if arguments else None


class _Submodules(MetaPathFinder, Loader):
    """Makes any module below one package.

    Args:
        package: its name.
    """

    def __init__(self, package: str) -> None:
        self._below = f"{package}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(self._below) else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = _named


def stand_in(package: str, version: str) -> None:
    """Have an imported package give a `Placeholder` for whatever it is asked for."""
    vars(sys.modules[package]).update(__version__=version, __getattr__=_named)
    sys.meta_path.insert(0, _Submodules(package))


def _named(name: str) -> type[Placeholder]:
    if name.startswith("__"):  # what Python itself looks for, and may do without
        raise AttributeError(name)
    return Placeholder

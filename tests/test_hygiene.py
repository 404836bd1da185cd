"""House rules that no linter knows, over every module that ships, each proven on a snippet that breaks it."""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for package in ("cpe_daemon", "inference_plugins") for path in (ROOT / package).rglob("*.py"))

MAX_LINES = 350
RUNS_CODE_ON_LOAD = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
SAYS_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc"}
BROAD = {"Exception", "BaseException"}
TASK_BOUNDARY = re.compile(r"# task boundary: \S")


@dataclass(frozen=True)
class Module:
    """One parsed source file; `path` is relative to the project."""

    path: Path
    source: str

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.source)))

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.source.splitlines()

    @functools.cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of everything imported; `from a import b` counts as a.b."""
        found: list[tuple[int, str]] = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found

    @functools.cached_property
    def attributes(self) -> list[tuple[int, str]]:
        """(line, dotted name) of every attribute taken of a name: `torch.cuda.Event` is one of them."""
        return [
            (node.lineno, ast.unparse(node))
            for node in self.nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute)
        ]

    def uses(self, dotted: str) -> Iterator[int]:
        """Lines that import or name `dotted`."""
        yield from (line for line, name in self.imports + self.attributes if name == dotted)


def no_format_that_runs_code(module: Module) -> Iterator[int]:
    """Bytes from a peer are data: pickle and its kin turn them into code."""
    yield from (line for line, name in module.imports if name.partition(".")[0] in RUNS_CODE_ON_LOAD)


def no_torch_load(module: Module) -> Iterator[int]:
    """It unpickles."""
    yield from module.uses("torch.load")


def no_python_objects_over_zmq(module: Module) -> Iterator[int]:
    """They travel pickled."""
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and node.attr in {"recv_pyobj", "send_pyobj"}:
            yield node.lineno


def no_assert(module: Module) -> Iterator[int]:
    """Under -O it vanishes, with whatever it guarded."""
    yield from (node.lineno for node in module.nodes if isinstance(node, ast.Assert))


def no_bare_except(module: Module) -> Iterator[int]:
    """It swallows cancellation and KeyboardInterrupt."""
    for node in module.nodes:
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno


def broad_except_only_at_a_task_boundary(module: Module) -> Iterator[int]:
    """Elsewhere it hides bugs; where a task ends, the line says why all errors end there."""
    for node in module.nodes:
        caught: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"suppress", "contextlib.suppress"}:
            caught = node.args
        for expression in caught:
            broad = ast.unparse(expression).removeprefix("builtins.") in BROAD
            if broad and not TASK_BOUNDARY.search(module.lines[expression.lineno - 1]):
                yield expression.lineno


def at_most_350_lines(module: Module) -> Iterator[int]:
    """A longer module is more than one room."""
    if len(module.lines) > MAX_LINES:
        yield len(module.lines)


def a_name_that_says_what_is_inside(module: Module) -> Iterator[int]:
    """What would be called utils has no name yet: find it."""
    if SAYS_NOTHING & {part.lstrip("_") for part in module.path.with_suffix("").parts}:
        yield 1


def no_sleep(module: Module) -> Iterator[int]:
    """Who sleeps waits too long or too short: wait on the event, with a deadline."""
    yield from module.uses("time.sleep")


Rule = Callable[[Module], Iterator[int]]

# rule -> (a snippet that breaks it, the line where it does)
BROKEN: dict[Rule, list[tuple[str, int]]] = {
    no_format_that_runs_code: [
        ("import pickle", 1),
        ("def f():\n    from cloudpickle import loads", 2),
        ("import dill as json", 1),
        ("import os, marshal", 1),
    ],
    no_torch_load: [("import torch\ntorch.load(path)", 2), ("from torch import load", 1)],
    no_python_objects_over_zmq: [("socket.recv_pyobj()", 1), ("self.sockets[0].send_pyobj(x)", 1)],
    no_assert: [("x = 1\nassert x", 2)],
    no_bare_except: [("try:\n    f()\nexcept:\n    pass", 3)],
    broad_except_only_at_a_task_boundary: [
        ("try:\n    f()\nexcept Exception:\n    pass", 3),
        ("try:\n    f()\nexcept BaseException as error:\n    raise", 3),
        ("try:\n    f()\nexcept (OSError, Exception):  # whatever\n    pass", 3),
        ("try:\n    f()\nexcept* Exception:  # task boundary:\n    pass", 3),
        ("import contextlib\nwith contextlib.suppress(Exception):\n    f()", 2),
    ],
    at_most_350_lines: [("x = 1\n" * 351, 351)],
    no_sleep: [("import time\ntime.sleep(1)", 2), ("from time import monotonic, sleep", 1)],
}

CLEAN = '''
"""It may speak of pickle and torch.load, and say why it does not assert."""
import asyncio
import json
import time

from safetensors.torch import load

async def run(job):
    started = time.monotonic()
    try:
        await job()
    except (OSError, TimeoutError):
        await asyncio.sleep(0)
    except Exception as error:  # task boundary: one job's failure must not end the others
        report(error, time.monotonic() - started)
    return json.loads("{}")
'''

RULES: list[Rule] = [*BROKEN, a_name_that_says_what_is_inside]


@functools.cache
def parse(path: Path) -> Module:
    return Module(path.relative_to(ROOT), path.read_text())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps(path: Path, rule: Rule) -> None:
    module = parse(path)
    broken_at = [f"{module.path}:{line}" for line in rule(module)]
    assert not broken_at, rule.__doc__


@pytest.mark.parametrize(
    ("rule", "snippet", "line"),
    [
        pytest.param(rule, snippet, line, id=f"{rule.__name__}-{number}")
        for rule, snippets in BROKEN.items()
        for number, (snippet, line) in enumerate(snippets)
    ],
)
def test_rule_finds(rule: Rule, snippet: str, line: int) -> None:
    assert list(rule(Module(Path("planted.py"), snippet))) == [line]


@pytest.mark.parametrize("path", ["cpe_daemon/utils.py", "cpe_daemon/helpers/slots.py", "cpe_daemon/push/_common.py"])
def test_rule_finds_a_name_that_says_nothing(path: str) -> None:
    assert list(a_name_that_says_what_is_inside(Module(Path(path), ""))) == [1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_passes_clean_code(rule: Rule) -> None:
    assert list(rule(Module(Path("cpe_daemon/commons.py"), CLEAN))) == []


def test_modules_are_found() -> None:
    assert ROOT / "cpe_daemon" / "__init__.py" in MODULES
    assert ROOT / "inference_plugins" / "__init__.py" in MODULES

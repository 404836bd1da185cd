"""The demo's course: choose a model, set the scene, publish versions, clean up, and judge."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from cpe_daemon.demo.architecture import QWEN3_600M, Architecture, parameters
from cpe_daemon.demo.memory import choose
from cpe_daemon.demo.options import SABOTAGE_ENV, Options
from cpe_daemon.demo.scene import RANKS, Scene
from cpe_daemon.demo.show import Result, Row, Screen, show_json, show_table
from cpe_daemon.errors import EngineError, MisuseError

_LONGEST_RUNTIME_DIR: Final = 80
_NAMED: Final = 5


def run_scenario(options: Options, check: Callable[[], None] = lambda: None) -> int:
    """Run the demo; return 0.

    Args:
        options: what was asked for.
        check: called between versions; may raise.

    Raises:
        EngineError: an engine holds other bytes than were published.
        CpeError: it could not be carried out.
    """
    began = time.monotonic()
    torch.set_num_threads(1)  # the daemon and the engine need the cores
    screen = Screen(quiet=options.as_json)
    with _temporary_directory() as temporary, _files(options.keep, temporary) as files:
        architecture, why = choose(options, RANKS, files)
        result = Result(_title(architecture), len(list(architecture.specs())), architecture.nbytes, RANKS)
        screen.say(f"{result.model}: {parameters(architecture) / 1e6:.0f} M parameters, bfloat16, random weights")
        if why:
            screen.say(f"[yellow]{why}[/]")
        with Scene(files, temporary, architecture, screen, sabotage=SABOTAGE_ENV in os.environ) as scene:
            for number in range(1, options.versions + 1):
                check()
                result.rows.append(scene.publish(number))
            result.passes = scene.passes
    result.seconds = time.monotonic() - began
    (show_json if options.as_json else show_table)(result)
    for row in result.rows:
        _check(row)
    return 0


def _title(architecture: Architecture) -> str:
    return "Qwen3-0.6B" if architecture == QWEN3_600M else "a small model built like Qwen3-0.6B"


def _check(row: Row) -> None:
    """Refuse a version that did not arrive.

    Raises:
        EngineError: names what differs.
    """
    if not row.identical:
        more = f" and {len(row.different) - _NAMED} more" if len(row.different) > _NAMED else ""
        raise EngineError(
            f"version {row.version}: the engine holds other bytes than the trainer published in"
            f" {', '.join(row.different[:_NAMED])}{more}"
        )


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    """A directory that goes away, with a path short enough for the sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="cpe-demo-"))
    if len(os.fsencode(path)) > _LONGEST_RUNTIME_DIR:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="cpe-demo-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _files(keep: Path | None, temporary: Path) -> Iterator[Path]:
    """The directory for checkpoint and logs.

    Raises:
        MisuseError: the directory to keep them in cannot be used, or holds something already.
    """
    if keep is None:
        yield temporary
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        taken = any(keep.iterdir())
    except OSError as error:
        raise MisuseError(f"cannot keep the demo's files in {keep}: {error.strerror}") from None
    if taken:
        raise MisuseError(f"{keep} is not empty; name a directory that is, or that is not there yet")
    yield keep.absolute()

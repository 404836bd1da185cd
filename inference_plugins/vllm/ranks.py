"""Which of an engine's workers a vLLM worker is: among all that the server's API reaches, of each data-parallel rank.

Where a model has no experts, vLLM's data-parallel ranks are independent engines behind one API, and each believes that
it is alone. `note` has the server's process tell them how many they are.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

from cpe_daemon.errors import EngineError

CORES: Final = "CPE_VLLM_CORES"
"""``FIRST:COUNT``: the data-parallel ranks that one API reaches."""


def place(parallel: Any, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """A worker's rank, and how many there are.

    Args:
        parallel: vLLM's configuration in the worker.
        environ: what the server's process has noted.

    Raises:
        EngineError: it cannot be told, or the workers cannot be paused together; says what to do.
    """
    size: int = parallel.data_parallel_size
    first, index = 0, parallel.data_parallel_rank
    if size > 1:
        if _local(parallel):
            raise EngineError(
                "experts are spread over several servers, which cannot be paused together: use one server's"
                " --data-parallel-size, without --data-parallel-rank and --data-parallel-hybrid-lb"
            )
    else:
        first, size = _noted(environ)
        index = getattr(parallel, "data_parallel_index", 0)
    if not first <= index < first + size:
        raise EngineError(
            f"data-parallel rank {index} is not among the {size} from {first} on that {CORES} says; set it to"
            f" FIRST:COUNT, the ranks that this server's API reaches, as in {CORES}=0:2"
        )
    return (index - first) * parallel.world_size + parallel.rank, size * parallel.world_size


def note(environ: MutableMapping[str, str] = os.environ) -> None:
    """From now on tell the processes that vLLM starts which data-parallel ranks there are.

    Does nothing in a process that vLLM started: there, nobody reads a server's arguments.
    """
    arguments: Any = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", None)
    if arguments is not None and not hasattr(arguments.create_engine_config, "notes"):
        arguments.create_engine_config = _noting(arguments.create_engine_config, environ)


def _noting(create: Callable[..., Any], environ: MutableMapping[str, str]) -> Callable[..., Any]:
    @functools.wraps(create)
    def noting(*arguments: Any, **named: Any) -> Any:
        made = create(*arguments, **named)
        parallel = made.parallel_config
        if _local(parallel):
            environ[CORES] = f"{parallel.data_parallel_rank}:{parallel.data_parallel_size_local}"
        else:
            environ[CORES] = f"0:{parallel.data_parallel_size}"
        return made

    noting.notes = True  # type: ignore[attr-defined]
    return noting


def _local(parallel: Any) -> bool:
    """Whether a server's API reaches the ranks of its own node, or its own rank, only."""
    return any(getattr(parallel, f"data_parallel_{kind}_lb", False) for kind in ("external", "hybrid"))


def _noted(environ: Mapping[str, str]) -> tuple[int, int]:
    """What `note` noted.

    Raises:
        EngineError: it makes no sense.
    """
    given = environ.get(CORES) or "0:1"
    first, _, count = given.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(count) > 0):
        raise EngineError(f"{CORES} is {given!r}; it is FIRST:COUNT, as in 0:2")
    return int(first), int(count)

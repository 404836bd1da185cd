"""What the kit has to know of a plugin: how to make an engine, to read its weights, and to tell whether it serves."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch

from cpe_daemon.wire.messages import PROTOCOL, WorkerHello
from inference_plugins.loader import Loader
from inference_plugins.receiver import Receiver

Tensors = Mapping[str, torch.Tensor]
"""By name. The kit does not write to them, and copies what it keeps."""

E = TypeVar("E")

_CLOSE_SECONDS: Final = 10.0


def _as_it_is(version: Tensors) -> Tensors:
    return version


@dataclass(frozen=True)
class Plugin(Generic[E]):
    """A plugin, told by a few functions. ``E`` is whatever ``make`` returns: one engine, with one worker.

    Attributes:
        make: starts an engine and attaches its worker to the daemon at an endpoint (``ipc://PATH``). It may wait for
            the daemon's welcome; it is called in a thread.
        close: detaches it, and gives back what it took.
        weights: the engine's weights by name, as a forward pass would use them; called while it does not load.
        serving: whether it may run forward passes now.
        checkpoint: the tensors of a version, by a seed. The same names, dtypes and shapes for every seed, and other
            values; small ones do, but at least one has more than 512 bytes.
        expected: what ``weights`` is when a version's tensors were loaded: with what the engine slices, ties and fuses.
            Only the names that it returns are compared. By default the version's tensors themselves.
        needed: the name of a tensor without which no version is whole; "" takes the largest.
        forward: a context manager in which a forward pass is under way; None: not to be tried.
        sleep: has the engine lend its memory to others; None: it cannot.
        wake_up: the engine has its memory again, and what was in it (True) or not (False); goes with ``sleep``.
        patience_seconds: that the worker may take for a step, or to find the next daemon.
    """

    make: Callable[[str], E]
    close: Callable[[E], object]
    weights: Callable[[E], Tensors]
    serving: Callable[[E], bool]
    checkpoint: Callable[[int], Tensors]
    expected: Callable[[Tensors], Tensors] = _as_it_is
    needed: str = ""
    forward: Callable[[E], AbstractContextManager[object]] | None = None
    sleep: Callable[[E], object] | None = None
    wake_up: Callable[[E, bool], object] | None = None
    patience_seconds: float = 20.0


class LoaderWorker:
    """A worker that is a `Loader` and nothing else: a `Receiver` in a thread, as a plugin's own code runs it.

    For engines whose own process is not at hand: what belongs to the loader is put to the test, and what its
    surroundings do beside it is played by who makes it.

    Args:
        endpoint: the daemon's.
        loader: the engine.
        kind: of engine, as a plugin's entry point names it.
        rank: this worker's.
        world_size: how many workers the engine has; the others are not there.
    """

    def __init__(
        self, endpoint: str, loader: Loader, *, kind: str = "conformance", rank: int = 0, world_size: int = 1
    ) -> None:
        hello = WorkerHello(PROTOCOL, "conformance", kind, rank, world_size, incarnation=uuid.uuid4().hex)
        self._receiver = Receiver(endpoint, hello, loader)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpe-receiver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._receiver.run(self._stopped)
        finally:
            self._receiver.close()

    def sleep(self, seconds: float = 10.0) -> None:
        """See `Receiver.sleep`."""
        self._receiver.sleep(seconds)

    def wake_up(self, *, kept: bool, seconds: float = 10.0) -> None:
        """See `Receiver.wake_up`."""
        self._receiver.wake_up(seconds, kept=kept)

    def close(self) -> None:
        """Detach, and end the thread."""
        self._stopped.set()
        self._receiver.wake()
        self._thread.join(_CLOSE_SECONDS)

"""`attach`: connects a torch engine's worker to the daemon of its node, and updates it in the background."""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import DeadlineError, EngineError, MisuseError
from cpe_daemon.wire.messages import PROTOCOL, WorkerHello
from inference_plugins.assembly import Place, meta_of
from inference_plugins.receiver import Receiver
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import Callback, Slicer, Slicing, Target, make_target

log: Final = logging.getLogger(__name__)

SOCKET_ENV: Final = "CPE_ENGINES_SOCKET"
DEFAULT_SOCKET: Final = "ipc:///run/cpe/engines.sock"
_CLOSE_SECONDS: Final = 10.0
_NAMED: Final = 10
_MIXED: Final = "an update was begun and is not finished: the weights may be a mixture of versions"


class _TorchLoader:
    """Applies updates to a target under the serving lock (see `inference_plugins.receiver.Loader`)."""

    def __init__(self, target: Target, lock: ServingLock, changed: threading.Condition) -> None:
        self.content: VersionId | None = None
        self.touched = False
        self.serving = False
        self._target = target
        self._lock = lock
        self._changed = changed
        self._trouble: str | None = None
        """Why the last update failed, for whoever waits for the lock."""

    def pause(self, seconds: float) -> None:
        self._lock.shut(self._reason(), seconds)
        self._tell(serving=False)

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        self._trouble = None
        with self._explaining():
            self._target.expect([(tensor.name, meta_of(tensor)) for tensor in tensors])

    def begin(self) -> None:
        self._target.begin()

    def place(self, tensors: Sequence[TensorSpec]) -> Sequence[Place | None]:
        with self._explaining():
            places = self._target.place(tensors)
        if any(places):
            self._touch()
        return places

    @torch.no_grad()
    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        with self._explaining():
            self._target.check(tensors)
            self._touch()
            for name, tensor in tensors:
                self._target.write(name, tensor)

    def finish(self, version: VersionId) -> None:
        with self._explaining():
            missing = self._target.missing()
            if missing:
                more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
                raise EngineError(f"{version} brought nothing for {', '.join(missing[:_NAMED])}{more}")
        self.content = version
        self.touched = False
        self._trouble = None

    def resume(self) -> None:
        self._lock.open()
        self._tell(serving=True)

    def _touch(self) -> None:
        """Weights change from now on."""
        if not self.touched:
            self.touched = True
            self._lock.explain(self._reason())

    def _reason(self) -> str:
        reason = _MIXED if self.touched else "its weights are being updated, or it awaits the live version"
        return f"{reason}; last failure: {self._trouble}" if self._trouble else reason

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Keep the reason of a failure for whoever waits, and pass it on."""
        try:
            yield
        except Exception as error:  # task boundary: only noted here, and raised again
            self._trouble = str(error)
            self._lock.explain(self._reason())
            raise

    def _tell(self, *, serving: bool) -> None:
        with self._changed:
            self.serving = serving
            self._changed.notify_all()


class Attachment:
    """A worker attached to its daemon, made by `attach`. A context manager; any thread may use it.

    Attributes:
        lock: hold it for each forward pass; updates are applied while nobody does.
    """

    def __init__(
        self, receiver: Receiver, loader: _TorchLoader, lock: ServingLock, changed: threading.Condition
    ) -> None:
        self.lock = lock
        self._receiver = receiver
        self._loader = loader
        self._changed = changed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpe-receiver", daemon=True)

    @property
    def version(self) -> VersionId | None:
        """The version that the weights are; None: what the engine started with."""
        return self._loader.content

    @property
    def serving(self) -> bool:
        """Whether the engine holds a version whole and may serve."""
        return self._loader.serving

    def ready(self, timeout: float) -> None:
        """Wait until the engine may serve: it holds the live version, or there is none yet.

        Raises:
            DeadlineError: it may not after ``timeout`` seconds; says why.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._loader.serving, timeout):
                raise DeadlineError(f"the engine was not ready after {timeout:g} s: {self.lock.shut_because}")

    def close(self) -> None:
        """Detach; the engine keeps its weights, and the lock stays as it is. Never blocks for more than seconds."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._receiver.wake()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("the receiver's thread is still in the engine's code; it ends with the process")

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._receiver.run(self._stopped)
        finally:
            self._receiver.close()


def attach(
    target: torch.nn.Module | Mapping[str, torch.Tensor] | Callback,
    *,
    engine: str,
    rank: int = 0,
    world_size: int = 1,
    socket: str | None = None,
    slicing: Slicing | None = None,
    model: str = "",
    gpu: str = "",
    ignore: Collection[str] = (),
    connect_timeout: float = 30.0,
    lock_timeout: float = 600.0,
) -> Attachment:
    """Have a torch engine's weights updated in place by the daemon of this node.

    Returns as soon as the daemon knows this worker. If a version is live, the engine receives it before
    `Attachment.ready` returns and before `Attachment.lock` can be taken.

    Args:
        target: an ``nn.Module`` (its ``state_dict`` names are matched against the version's), a dict of tensors, or a
            function ``(name, tensor)`` that is given views, valid and read-only, during the call.
        engine: the serving instance's name on this node.
        rank: this worker's tensor-parallel rank.
        world_size: the engine's workers.
        socket: the daemon's socket for engines: ``ipc://PATH``, the path, or its runtime directory; else the
            environment's ``CPE_ENGINES_SOCKET``; else ``ipc:///run/cpe/engines.sock``.
        slicing: parameter name to the dimension that ranks share, as a function or a mapping; None: whole tensors.
        model: take only this model's versions; "" takes those of the only model there is.
        gpu: UUID of this worker's GPU; may be left out on a CPU host.
        ignore: names that a version may hold and this target has no place for.
        connect_timeout: seconds to wait for the daemon.
        lock_timeout: seconds that ``with attachment.lock`` waits while the engine is paused.

    Raises:
        DeadlineError: no daemon answered in time.
        MisuseError: rank and world size make no sense, or the daemon refuses this worker; says why.
    """
    if not 0 <= rank < world_size:
        raise MisuseError(f"rank {rank} of {world_size}")
    changed = threading.Condition()
    lock = ServingLock(lock_timeout)
    loader = _TorchLoader(make_target(target, Slicer(slicing, rank, world_size), ignore), lock, changed)
    hello = WorkerHello(
        protocol=PROTOCOL,
        engine=engine,
        kind="torch",
        rank=rank,
        world_size=world_size,
        incarnation=uuid.uuid4().hex,
        model=model,
        node=sockets.gethostname(),
        gpu=gpu,
        leader=rank == 0,
        pid=os.getpid(),
    )
    receiver = Receiver(_endpoint(socket), hello, loader)
    try:
        receiver.attach(connect_timeout)
    except BaseException:  # task boundary: nothing is kept open, whatever ended the wait
        receiver.close()
        raise
    attachment = Attachment(receiver, loader, lock, changed)
    attachment._start()
    return attachment


def _endpoint(socket: str | None) -> str:
    """Spell a socket out as an endpoint."""
    given = socket or os.environ.get(SOCKET_ENV) or DEFAULT_SOCKET
    if "://" in given:
        return given
    path = Path(given)  # of a directory that may be made later, or of the socket in it
    return f"ipc://{path if path.suffix == '.sock' or path.is_socket() else path / 'engines.sock'}"

"""`attach`: connects a torch engine's worker to the daemon of its node, and updates it in the background."""

from __future__ import annotations

import logging
import os
import socket as sockets
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Final

import torch

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, MisuseError
from cpe_daemon.links.permission import check_permission
from cpe_daemon.wire.messages import PROTOCOL, WorkerHello
from inference_plugins.endpoint import engines_endpoint
from inference_plugins.learned import LearnedLoading, Report
from inference_plugins.receiver import Receiver
from inference_plugins.torch.gpus import current, gpu_of
from inference_plugins.torch.learning import LearningTarget, WritesTo, make_target
from inference_plugins.torch.loader import TorchLoader
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import Callback, Slicer, Slicing

log: Final = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 10.0


class Attachment:
    """A worker attached to its daemon, made by `attach`. A context manager; any thread may use it.

    Attributes:
        lock: hold it for each forward pass; updates are applied while nobody does, and when the GPU has run it.
    """

    def __init__(
        self,
        receiver: Receiver,
        loader: TorchLoader,
        lock: ServingLock,
        changed: threading.Condition,
        gpu: str,
        learned: LearnedLoading | None = None,
    ) -> None:
        self.lock = lock
        self._learned = learned
        self._receiver = receiver
        self._loader = loader
        self._gpu = gpu
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

    @property
    def learned(self) -> Report:
        """How many tensors need the function no more, and why others do: see ``writes_to`` of `attach`."""
        return Report() if self._learned is None else self._learned.report

    def relearn(self) -> None:
        """Forget what was learned of the function: it puts tensors elsewhere from now on, in the same memory."""
        if self._learned is not None:
            self._learned.forget("the engine said so")

    def ready(self, timeout: float) -> None:
        """Wait until the engine may serve: it holds the live version, or there is none yet.

        Raises:
            DeadlineError: it may not after ``timeout`` seconds; says why.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._loader.serving, timeout):
                raise DeadlineError(f"the engine was not ready after {timeout:g} s: {self.lock.shut_because}")

    def sleep(self, timeout: float = 60.0) -> None:
        """Have the daemon leave the weights alone, so that their memory can be given to others.

        Returns when forward passes have ended, `lock` is shut, and this worker has let go of its slots; the daemon then
        gives these back too, if nobody else uses them. After that it sends nothing that touches weights, even if it is
        restarted. Versions go live without this engine, or wake it up first, as ``push.asleep`` says. Call it in every
        worker of the engine, and not from a thread that holds the lock. Does nothing to one that sleeps.

        Raises:
            DeadlineError: an update or a forward pass did not end within ``timeout`` seconds; it is awake.
            MisuseError: called by ``on_wake``, or after `close`.
        """
        self._check_thread()
        self._receiver.sleep(timeout)

    def wake_up(self, *, kept: bool = False, timeout: float = 60.0) -> None:
        """Say that the weights have their memory again, at the same places or others.

        The engine serves when all its workers are awake and the daemon has given it the live version, unless it holds
        that: see `ready`. Without a daemon it waits for one. Does nothing to a worker that is awake.

        Args:
            kept: the weights are what they were when it went to sleep. Otherwise they count as lost.
            timeout: seconds to wait for the receiver's thread.

        Raises:
            DeadlineError: the receiver's thread was busy all that time.
            MisuseError: called by ``on_wake``, which need not say it, or after `close`.
        """
        self._check_thread()
        self._receiver.wake_up(timeout, kept=kept)

    def _check_thread(self) -> None:
        if self._stopped.is_set():
            raise MisuseError("this worker was detached; the daemon knows it no more")
        if threading.current_thread() is self._thread:
            raise MisuseError("on_wake need only make the memory ready; the engine counts as awake when it returns")

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
            with current(self._gpu):
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
    writes_to: WritesTo | None = None,
    on_wake: Callable[[], object] | None = None,
    connect_timeout: float = 30.0,
    lock_timeout: float = 600.0,
) -> Attachment:
    """Have a torch engine's weights updated in place by the daemon of this node.

    Returns as soon as the daemon knows this worker. If a version is live, the engine receives it before
    `Attachment.ready` returns and before `Attachment.lock` can be taken.

    Args:
        target: an ``nn.Module`` (its ``state_dict`` names are matched against the version's), a dict of tensors, or a
            function ``(name, tensor)`` that is given views, to read from during the call. On a GPU it need only issue
            what it does with them, on torch's current stream.
        engine: the serving instance's name on this node.
        rank: this worker's tensor-parallel rank.
        world_size: the engine's workers.
        socket: the daemon's socket for engines: ``ipc://PATH``, the path, or its runtime directory; else the
            environment's ``CPE_ENGINES_SOCKET``; else ``ipc:///run/cpe/engines.sock``.
        slicing: parameter name to the dimension that ranks share, as a function or a mapping; None: whole tensors.
        model: take only this model's versions; "" takes those of the only model there is.
        gpu: UUID of this worker's GPU, whose slots it loads from; "" takes the GPU that the target's tensors are on,
            or, for a function, the current one if this process uses CUDA. On a CPU host the name of a set of slots.
        ignore: names that a version may hold and this target has no place for.
        writes_to: where the target is a function: all tensors that it writes to, in a module or by name. What it does
            is learned then, and where it only copies, the bytes are copied without it: it is not called for such
            tensors any more. See `Attachment.learned` and `Attachment.relearn`; ``CPE_LEARNED=off`` turns it off.
        on_wake: called in the receiver's thread when this worker sleeps (`Attachment.sleep`) and the daemon is told to
            wake engines up for a new version (``push.asleep: wake``). When it returns the weights have their memory
            again; what is in it is not used.
        connect_timeout: seconds to wait for the daemon.
        lock_timeout: seconds that ``with attachment.lock`` waits while the engine is paused.

    Raises:
        DeadlineError: no daemon answered in time.
        AccessError: this user may not connect to the daemon's socket.
        MisuseError: rank and world size make no sense, the GPU cannot be told or is not visible here, or the daemon
            refuses this worker; says why.
    """
    if not 0 <= rank < world_size:
        raise MisuseError(f"rank {rank} of {world_size}")
    changed = threading.Condition()
    lock = ServingLock(lock_timeout)
    made = make_target(target, Slicer(slicing, rank, world_size), ignore, writes_to)
    gpu = gpu or gpu_of(made.gpus())
    loader = TorchLoader(made, lock, changed, on_wake)
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
    endpoint = engines_endpoint(socket)
    check_permission(endpoint)
    receiver = Receiver(endpoint, hello, loader)
    try:
        with current(gpu):
            receiver.attach(connect_timeout)
    except DeadlineError:
        receiver.close()
        check_permission(endpoint)  # of a daemon that came while this worker waited
        raise
    except BaseException:  # task boundary: nothing is kept open, whatever ended the wait
        receiver.close()
        raise
    learned = made.learned if isinstance(made, LearningTarget) else None
    attachment = Attachment(receiver, loader, lock, changed, gpu, learned)
    attachment._start()
    return attachment

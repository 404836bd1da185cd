"""The `Publisher`: what a trainer rank publishes its weights with."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, SupportsIndex

from cpe_daemon.core.manifest import Layout
from cpe_daemon.core.names import check_names
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.errors import CpeError, DeadlineError, ManifestError, MisuseError
from cpe_daemon.links.keys import KeyPair, PublicKey, credentials, server_key_for
from cpe_daemon.publisher import asking
from cpe_daemon.publisher.delivery import Bell, Delivery
from cpe_daemon.publisher.folding import folding_of
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.handle import Handle, raise_failures
from cpe_daemon.publisher.link import Link
from cpe_daemon.publisher.outgoing import Lane, Progress, stream_into_rings
from cpe_daemon.publisher.reach import Reach, endpoint_of, this_boot
from cpe_daemon.publisher.report import PublishReport
from cpe_daemon.publisher.sending import MARGIN_SECONDS
from cpe_daemon.publisher.sources import Contribution, Source, open_source
from cpe_daemon.publisher.staged import Reporter, stage_and_send
from cpe_daemon.publisher.staging import Consumed, Staging
from cpe_daemon.publisher.stream import Pouring, threads_here
from cpe_daemon.wire.messages import PROTOCOL, TrainerHello

log = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0
"""How often a publish that waits for the one before it looks whether that moves."""


class Publisher:
    """Publishes versions of one model to the daemons of one or several nodes.

    Every rank of a training job has one. It connects in the background, and again whenever a daemon is restarted. Use
    it as a context manager: a clean exit waits until the last version's bytes are delivered. Thread-safe.

    Args:
        endpoints: where the daemons listen, ``ipc://PATH``, ``tcp://HOST:PORT`` or a runtime directory of this host;
            every one gets every version.
        model: the name that the weights are served under.
        run: the training run; version numbers grow within it.
        rank: which of the ranks that publish together this is.
        world_size: how many there are. A version is whole when all of them have contributed to it.
        connect_timeout: seconds that a publish waits for a daemon that has not answered yet.
        send_timeout: seconds that a daemon may leave bytes unacknowledged before its publish fails, and with it the
            wait of the next one.
        landing: False sends the bytes through the socket even to a daemon of this host, with which a trainer shares
            a landing ring otherwise: slower, and nothing of the daemon's is mapped here.
        key: this side's key pair for endpoints over tcp, or the path of its ``.key_secret`` file (`cpe keys new`).
        server_key: the public key by which the daemons are recognised, or the path of a file with it; if they have
            keys of their own, a mapping from endpoints to those.

    Raises:
        ConfigError: an endpoint is malformed, or a key cannot be used.
        MisuseError: another argument makes no sense.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        model: str,
        run: str,
        rank: int = 0,
        world_size: int = 1,
        connect_timeout: float = 30.0,
        send_timeout: float = 60.0,
        landing: bool = True,
        key: KeyPair | str | Path | None = None,
        server_key: PublicKey | Mapping[str, PublicKey] | None = None,
    ) -> None:
        names = [endpoint_of(name) for name in ([endpoints] if isinstance(endpoints, str) else endpoints)]
        if not names or len(set(names)) != len(names):
            raise MisuseError(f"give one or more endpoints, each once, not {names}")
        if not model or not run or not 0 <= rank < world_size:
            raise MisuseError(f"a publisher of {model!r} in run {run!r} as rank {rank} of {world_size} makes no sense")
        check_names(model=model, run=run)
        self._model, self._run, self._rank, self._world_size = model, run, rank, world_size
        self._connect_timeout, self._send_timeout = connect_timeout, send_timeout
        self._bell = Bell()
        self._turn = threading.Lock()
        self._staging = Staging()
        self._gpus = Gpus()
        self._reporter: Reporter | None = None
        self._previous: Sequence[Delivery] = ()
        self._closed = False
        boot_id = this_boot() if landing else ""
        hello = TrainerHello(PROTOCOL, model, run, rank, world_size, boot_id, os.getpid())
        self._links: list[Link] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for name in names:
                keys = credentials(key, server_key_for(name, server_key), name)
                self._links.append(
                    Link(name, hello, self._bell, self._gpus, send_timeout=send_timeout, credentials=keys)
                )
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._closed:
            try:
                self._await_previous()
            except DeadlineError as late:
                log.warning("%s", late.message)
        self.close()

    def publish(self, source: Source, version: int, *, force: bool = False, progress: Progress | None = None) -> Handle:
        """Publish a version; return as soon as the tensors may change again.

        To daemons of this host the tensors are written directly, and this returns when the last byte is; the wait
        includes the daemons' copying. Otherwise they are sent from where they lie as long as all daemons take them at
        least about as fast as they could be copied; what one is too slow for is copied to host memory, as is what is
        in GPUs, is not contiguous, or comes from an iterator. This returns when all is sent or copied. At most one
        publish is under way: the next waits for the one before it.

        The same holds for tensors in GPUs: what was issued on the calling thread's current streams is waited for, then
        they are copied, and when this returns a kernel may change them. Kernels on other streams are the caller's to
        wait for.

        Args:
            source: a mapping of names to tensors, (name, tensor) pairs, an ``nn.Module`` (its ``state_dict()``, a tied
                weight under each of its names), or a path: a ``.safetensors`` file or a directory of them.
            version: the number, higher than any that was staged before in this run. The same version again is no
                mistake: a daemon that holds it is sent nothing but digests, and `Handle.held` names it.
            force: return to a run that another one has superseded.
            progress: called with bytes done and bytes in all, for every chunk: by the calling thread while it streams,
                by a thread of its own otherwise. What it raises gives the version up.

        Raises:
            ManifestError: the source cannot be published.
            PeerLostError: no daemon answers.
            DeadlineError: the publish before this one does not come to its end.
            ResourceError: a GPU failed, or the host is short of memory.
            CpeError: every daemon refuses this rank. What becomes of the version itself, the handle tells.
        """
        identity = VersionId(self._model, self._run, _number(version))
        if not self._turn.acquire(timeout=self._send_timeout):
            raise DeadlineError(f"{identity} waited {self._send_timeout:g} s for another thread's publish")
        try:
            self._await_previous()
            reach = self._connect(identity)
            opened = open_source(source)
            if isinstance(opened, Contribution):
                return self._publish_held(opened, identity, reach, force, progress)
            consumed = self._staging.consume(opened, self._gpus)
            return self._publish_consumed(consumed, identity, reach, force, progress)
        finally:
            self._turn.release()

    def rollback(self, to: int | None = None, timeout: float = 600.0) -> PublishReport:
        """Have every daemon bring a version of this model back that was live before; wait up to ``timeout`` seconds.

        It costs one push. The next version to publish has a higher number all the same. One rank calls this.

        Args:
            to: its number, of any run. None: the one that was live last, so that doing it twice undoes it.
            timeout: a daemon that takes longer goes on with it.

        Raises:
            MisuseError: no such version is retained; or a rank other than 0 names none: ranks would undo each other.
            EngineError: no engine took it; what was live stays live.
            PeerLostError: a daemon does not answer.
            DeadlineError: one does not answer in time.
            PublishError: it failed at some of several daemons; names them.
        """
        if to is None and self._rank:
            raise MisuseError(f"rank {self._rank} rolls back only to a version that it names: rollback(to=...)")
        number, what = -1 if to is None else _number(to), f"the rollback of {self._model}"
        reach = self._connect(what)
        report, errors = asking.rollback(reach.sessions, number, timeout, self._bell)
        raise_failures(what, reach.failures | errors, len(self._links))
        return report

    def wait_live(self, number: int, run: str | None = None, timeout: float = 600.0) -> VersionId:
        """Wait up to ``timeout`` seconds until version ``number`` of a run, or a later one, is live at every daemon.

        Any rank's, and any process's: it need not have published it. ``run`` None: this publisher's.

        Returns:
            The version that is live; the lowest, where several daemons have different ones.

        Raises:
            CpeError: the version has failed; what made it fail.
            DeadlineError: the time is over; says how far it is.
            PublishError: either happened at some of several daemons; names them.
        """
        version = VersionId(self._model, run or self._run, _number(number))
        reach = self._connect(version)
        live, errors = asking.wait_live(reach.sessions, version.number, run, timeout, self._bell)
        raise_failures(version, reach.failures | errors, len(self._links))
        return min(live.values(), key=lambda version: version.number)

    def close(self) -> None:
        """Abandon what is not delivered, and end within some seconds. Handles stay usable; what they wait for fails."""
        self._closed = True
        deadline = time.monotonic() + _CLOSE_SECONDS
        for link in self._links:
            link.close_soon()
        late = [link.endpoint for link in self._links if not link.join(max(0.0, deadline - time.monotonic()))]
        if self._reporter is not None and not self._reporter.join(deadline - time.monotonic()):
            late.append("progress")
        if late:
            log.warning("threads left behind by close: %s", ", ".join(late))

    # --- the steps of a publish --------------------------------------------------------------------------------------

    def _publish_held(
        self, held: Contribution, version: VersionId, reach: Reach, force: bool, progress: Progress | None
    ) -> Handle:
        """Send tensors that can be read while they are sent."""
        folding = folding_of(held, self._gpus) if reach.folds else None
        timeout, folded = self._send_timeout + MARGIN_SECONDS, folding is not None
        if reach.one_ring_size:
            handle, lanes = self._begin(version, held.shards, held.layout, reach, force, folded=folded)
            pouring = Pouring(self._gpus, threads_here(), _counted(progress, held.layout.nbytes))
            stream_into_rings(held, lanes, pouring, timeout, self._bell, folding)
            return handle
        staged = self._staging.reserve(held.layout.nbytes)
        handle, lanes = self._begin(version, held.shards, held.layout, reach, force, folded=folded)
        self._report(held.layout.nbytes, lanes, progress)
        stage_and_send(held, self._staging, staged, lanes, Pouring(self._gpus, threads_here()), timeout, folding)
        return handle

    def _publish_consumed(
        self, consumed: Consumed, version: VersionId, reach: Reach, force: bool, progress: Progress | None
    ) -> Handle:
        """Send what an iterator yielded."""
        handle, lanes = self._begin(version, consumed.shards, consumed.layout, reach, force)
        self._report(consumed.layout.nbytes, lanes, progress)
        for lane in lanes:
            lane.feed(consumed.staged, consumed.layout.nbytes)
            lane.seal(consumed.digests)
        return handle

    def _report(self, total_bytes: int, lanes: Sequence[Lane], progress: Progress | None) -> None:
        if progress is not None:
            self._reporter = Reporter(total_bytes, lanes, progress, self._bell)

    def _await_previous(self) -> None:
        """Wait until the bytes of the publish before are delivered everywhere, or have failed.

        That takes as long as they move. If they do not, their link fails them after the send timeout.
        """
        seen: tuple[int, int] | None = None
        deadline = 0.0
        with self._bell.lock:
            while pending := [delivery for delivery in self._previous if not delivery.settled]:
                moved = len(pending), sum(delivery.sent_bytes for delivery in pending)
                if moved != seen:
                    seen, deadline = moved, time.monotonic() + self._send_timeout + MARGIN_SECONDS
                left = deadline - time.monotonic()
                if left <= 0:
                    where = ", ".join(f"{delivery.state} at {delivery.endpoint}" for delivery in pending)
                    raise DeadlineError(f"{pending[0].version} is still on its way ({where})")
                self._bell.changed.wait(min(left, _LOOK_SECONDS))
        if self._reporter is not None and not self._reporter.join(self._send_timeout):
            raise DeadlineError(f"the publish before is still reporting its progress after {self._send_timeout:g} s")
        self._reporter = None

    def _connect(self, version: VersionId | str) -> Reach:
        """Find out which daemons can be reached, waiting for those that do not answer yet."""
        if self._closed:
            raise MisuseError("this publisher is closed")
        reach = Reach({}, {})
        deadline = time.monotonic() + self._connect_timeout
        for link in self._links:
            try:
                reach.sessions[link.endpoint] = link.ready(version, max(0.0, deadline - time.monotonic()))
            except CpeError as error:
                reach.failures[link.endpoint] = error
        if not reach.sessions:
            raise_failures(version, reach.failures, len(self._links))
        return reach

    def _begin(
        self,
        version: VersionId,
        shards: list[Shard],
        layout: Layout,
        reach: Reach,
        force: bool,
        *,
        folded: bool = False,
    ) -> tuple[Handle, list[Lane]]:
        """Announce the version to every daemon that can be reached; ``folded``: its fold comes with the seal.

        Raises:
            ManifestError: there is nothing to announce, and no other rank that might bring something.
        """
        if not shards and self._world_size == 1:
            raise ManifestError("the source holds no tensor")
        deliveries = {
            link.endpoint: Delivery(link.endpoint, version, layout.nbytes, len(shards), self._bell)
            for link in self._links
        }
        for endpoint, error in reach.failures.items():
            deliveries[endpoint].fail(error)
        self._previous = list(deliveries.values())
        lanes = [
            Lane.begin(session, deliveries[name], shards, force, folded=folded)
            for name, session in reach.sessions.items()
        ]
        return Handle(version, self._previous, self._bell), lanes


def _counted(progress: Progress | None, total_bytes: int) -> Callable[[int], None]:
    """Turn what was done since the last call into what is done in all."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total_bytes)

    return count


def _number(version: SupportsIndex) -> int:
    """A version's number as a plain int.

    Raises:
        MisuseError: it is no whole number, or a negative one.
    """
    try:
        number = -1 if isinstance(version, bool) else operator.index(version)
    except TypeError:
        number = -1
    if number < 0:
        raise MisuseError(f"a version's number is a whole number, 0 or higher, not {version!r}")
    return number

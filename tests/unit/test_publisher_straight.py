"""Chunks that are sent from the trainer's tensors, to a scripted daemon: the same bytes, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor

from cpe_daemon.errors import DeadlineError, DigestError, PeerLostError, PublishError
from cpe_daemon.publisher import Handle, Publisher, in_place, straight
from cpe_daemon.publisher.in_place import InPlace
from cpe_daemon.publisher.patience import Patience
from cpe_daemon.publisher.staging import Staging
from cpe_daemon.publisher.straight import Straight
from cpe_daemon.publisher.window import Window
from cpe_daemon.wire.messages import Abandon, Chunk, Seal
from tests.unit.fake_daemon import WAIT_SECONDS, FakeDaemon
from tests.unit.tensor_zoo import bytes_of, tensor_of, zoo

# The first frame that is sent without a copy starts pyzmq's own thread, which stays: not a leak of ours.
zmq.Frame(bytes(1 << 20), copy=False)

MakeDaemon = Callable[..., FakeDaemon]
CHUNK = 4096


@pytest.fixture
def make_daemon(runtime_dir: Path) -> Iterator[MakeDaemon]:
    daemons: list[FakeDaemon] = []

    def make(name: str = "front", **terms: Any) -> FakeDaemon:
        daemons.append(
            FakeDaemon(runtime_dir, name, landing=False, chunk_bytes=terms.pop("chunk_bytes", CHUNK), **terms)
        )
        return daemons[-1].start()

    yield make
    for daemon in daemons:
        daemon.stop()
    assert [violation for daemon in daemons for violation in daemon.violations] == []


@pytest.fixture(autouse=True)
def every_part_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of some bytes get frames of their own, as those of megabytes do."""
    monkeypatch.setattr(in_place, "SMALL_BYTES", 1)
    monkeypatch.setattr(straight, "SMALL_BYTES", 1)


class Noted:
    """Which chunks were to be sent from where they lie, and which places for copies were asked for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lying: list[int] = []
        self.copied: list[int] = []
        put, window = Straight.put, Staging.window

        def note_put(kept: Straight, offset: int, chunk: InPlace) -> None:
            self.lying.append(offset)
            put(kept, offset, chunk)

        def note_window(staging: Staging, offset: int, nbytes: int) -> Window:
            self.copied.append(offset)
            return window(staging, offset, nbytes)

        patch.setattr(Straight, "put", note_put)
        patch.setattr(Staging, "window", note_window)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    return Noted(monkeypatch)


def waits(patch: pytest.MonkeyPatch, seconds: Iterator[float]) -> None:
    """Say how long the links may be waited for, each time that it is asked."""
    patch.setattr(Patience, "left", lambda patience, sent_bytes, now: next(seconds))


def always(patch: pytest.MonkeyPatch) -> None:
    """Wait for the links however slow they are."""
    waits(patch, itertools.repeat(WAIT_SECONDS))


def publisher(*daemons: FakeDaemon, **options: Any) -> Publisher:
    settings = {"model": "m", "run": "r", "connect_timeout": WAIT_SECONDS, "send_timeout": WAIT_SECONDS, **options}
    return Publisher([daemon.endpoint for daemon in daemons], **settings)


def some(chunks: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """A tensor that takes so many chunks, and small ones around it."""
    return {
        "a": tensor_of("float32", 5, seed=seed + 1),
        "b": tensor_of("uint8", chunks * CHUNK - 500, seed=seed),
        "c": tensor_of("uint8", 700, seed=seed + 2),
    }


def content(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


def in_thread(publish: Callable[[], Handle]) -> tuple[threading.Thread, list[Handle]]:
    handles: list[Handle] = []
    thread = threading.Thread(target=lambda: handles.append(publish()))
    thread.start()
    return thread, handles


# --- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaks")
def test_link_that_keeps_up_is_sent_the_tensors_themselves(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemon, tensors = make_daemon(), some()
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(tensors)
    assert (len(noted.lying), noted.copied) == (daemon.last.chunks, [])
    assert daemon.last.frames > daemon.last.chunks > 20


@pytest.mark.parametrize("chunk_bytes", [256, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("cores", [1, 8])
def test_every_kind_of_tensor_arrives_straight_or_copied(
    make_daemon: MakeDaemon, noted: Noted, chunk_bytes: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpe_daemon.publisher.publisher.threads_here", lambda: cores)
    daemon, tensors = make_daemon(chunk_bytes=chunk_bytes), some() | zoo()
    contents = []
    for seconds in (WAIT_SECONDS, 0.0):
        waits(monkeypatch, itertools.repeat(seconds))
        with publisher(daemon) as pub:
            pub.publish(tensors, 1).staged(WAIT_SECONDS)
        assert daemon.last.tensors() == content(tensors)
        contents.append(bytes(daemon.last.content))
    assert contents[0] == contents[1]
    assert (len(noted.lying) > 0) is (chunk_bytes < 1 << 20)  # one chunk of all has too many parts


@pytest.mark.parametrize("seed", range(12))
def test_any_turn_between_straight_and_copied_brings_the_same(
    make_daemon: MakeDaemon, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    waits(monkeypatch, iter(lambda: rng.choice((0.0, 0.001, 0.01)), None))
    daemon = make_daemon(credits=rng.randint(1, 5), chunk_frames=rng.randint(1, 8))
    tensors = {f"t{at}": tensor_of("uint8", rng.randrange(9000), seed=at) for at in range(40)}
    with publisher(daemon) as pub:
        for version in (1, 2):
            expected = content(tensors)
            handle = pub.publish(tensors, version)
            for tensor in tensors.values():
                tensor.add_(1)
            handle.staged(WAIT_SECONDS)
            assert daemon.last.tensors() == expected


def test_tensors_may_change_as_soon_as_publish_has_returned(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemon, tensors = make_daemon(chunk_bytes=1 << 16, credits=16), {"a": tensor_of("uint8", 1 << 21)}
    with publisher(daemon) as pub:
        for version in range(30):
            expected = content(tensors)
            handle = pub.publish(tensors, version)
            tensors["a"].add_(1)
            handle.staged(WAIT_SECONDS)
            assert daemon.last.tensors() == expected
    assert len(noted.lying) == 30 * 32


def test_daemon_that_says_nothing_of_frames_gets_one_for_each_chunk(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemon, tensors = make_daemon(chunk_frames=1), some()
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(tensors)
    assert daemon.last.frames == daemon.last.chunks
    assert noted.lying
    assert noted.copied


def test_version_that_is_held_is_only_digested(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemon = make_daemon()
    daemon.script.held = "live"
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1)
        handle.live(WAIT_SECONDS)
        assert handle.held == [daemon.endpoint]
    assert (daemon.last.chunks, noted.copied) == (0, [])


# --- a link that does not keep up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("patient_for", [0, 1, 2, 3, 7])
def test_slow_link_gets_a_copy_and_publish_returns(
    make_daemon: MakeDaemon, noted: Noted, patient_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few of its chunks were acknowledged."""
    waits(monkeypatch, itertools.chain(itertools.repeat(0.01, patient_for), itertools.repeat(0.0)))
    daemon, tensors = make_daemon(), some()
    daemon.script.keep_chunks = True
    expected = content(tensors)
    with publisher(daemon) as pub:
        handle = pub.publish(tensors, 1)
        for tensor in tensors.values():
            tensor.zero_()
        daemon.wait_for_message(Chunk, daemon.credits)
        assert daemon.kept() == daemon.credits
        assert handle.state == "receiving"
        daemon.give_back()
        handle.staged(WAIT_SECONDS)
    assert daemon.last.tensors() == expected
    assert len(set(noted.lying)) <= patient_for
    assert len(set(noted.copied)) >= daemon.last.chunks - 2  # so many may be under way before any is acknowledged


def test_daemon_without_room_gets_a_copy_and_publish_returns(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.script.ignore_open = True
    with publisher(daemon, send_timeout=1.0) as pub:
        handle = pub.publish(some(), 1)
        assert handle.state == "opening"
        with pytest.raises(DeadlineError, match="made no room"):
            handle.staged(WAIT_SECONDS)


def test_link_that_has_caught_up_is_sent_the_tensors_again(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits(monkeypatch, itertools.chain(itertools.repeat(0.0, 10), itertools.repeat(WAIT_SECONDS)))
    daemon, tensors = make_daemon(), some(40)
    with publisher(daemon) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(tensors)
    assert noted.copied == [chunk * CHUNK for chunk in range(10)]
    assert noted.lying == [chunk * CHUNK for chunk in range(10, daemon.last.chunks)]


def test_slowest_of_several_daemons_decides(make_daemon: MakeDaemon) -> None:
    slow, fast, tensors = make_daemon("slow"), make_daemon("fast"), some()
    slow.script.keep_chunks = True
    expected = content(tensors)
    with publisher(slow, fast) as pub:
        handle = pub.publish(tensors, 1)
        for tensor in tensors.values():
            tensor.zero_()
        fast.wait_for_message(Seal)
        slow.give_back()
        handle.staged(WAIT_SECONDS)
    assert slow.last.tensors() == fast.last.tensors() == expected


def test_several_daemons_are_sent_the_same_tensors(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemons, tensors = [make_daemon(name, credits=credits) for name, credits in (("a", 1), ("b", 7))], some()
    with publisher(*daemons) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert [daemon.last.tensors() for daemon in daemons] == [content(tensors)] * 2
    assert noted.copied == []


def test_daemons_of_different_grids_get_copies(
    make_daemon: MakeDaemon, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemons, tensors = [make_daemon("a"), make_daemon("b", chunk_bytes=2 * CHUNK)], some()
    with publisher(*daemons) as pub:
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
    assert [daemon.last.tensors() for daemon in daemons] == [content(tensors)] * 2
    assert noted.lying == []


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaks")
def test_daemon_that_ends_midway_fails_the_version_and_lets_the_tensors_go(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    daemon = make_daemon(heartbeat_seconds=0.5)
    daemon.script.keep_chunks = True
    tensors = some(50)
    alive = weakref.ref(tensors["b"])
    with publisher(daemon) as pub:
        thread, handles = in_thread(lambda: pub.publish(tensors, 1))
        daemon.wait_for_message(Chunk, 2)
        daemon.stop()
        thread.join(WAIT_SECONDS)
        tensors.clear()
        gc.collect()
        assert alive() is None
        with pytest.raises(PeerLostError):
            handles[0].staged(WAIT_SECONDS)
        daemon.script.keep_chunks = False
        daemon.start()
        pub.publish(some(), 2).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some())


def test_daemon_that_stalls_passes_the_deadline(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    daemon = make_daemon()
    daemon.script.keep_chunks = True
    with publisher(daemon, send_timeout=2.0) as pub:
        handle = pub.publish(some(), 1)
        with pytest.raises(DeadlineError, match="acknowledged no bytes of m@r#1"):
            handle.staged(WAIT_SECONDS)
        daemon.wait_for_message(Abandon)
        daemon.give_back()
        pub.publish(some(), 2).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(some())


def test_one_of_several_daemons_that_ends_does_not_keep_the_others_waiting(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    ending, other, tensors = make_daemon("ending", heartbeat_seconds=0.5), make_daemon("other"), some()
    ending.script.keep_chunks = True
    with publisher(ending, other) as pub:
        thread, handles = in_thread(lambda: pub.publish(tensors, 1))
        ending.wait_for_message(Chunk, 2)
        ending.stop()
        thread.join(WAIT_SECONDS)
        other.wait_for_message(Seal)
        with pytest.raises(PublishError, match=r"failed at 1 of 2 daemons: .*ending"):
            handles[0].staged(WAIT_SECONDS)
    assert other.last.tensors() == content(tensors)


def test_what_is_raised_midway_gives_the_version_up(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    put = Straight.put

    def interrupted(kept: Straight, offset: int, chunk: InPlace) -> None:
        if offset == 5 * CHUNK:
            raise KeyboardInterrupt
        put(kept, offset, chunk)

    monkeypatch.setattr(Straight, "put", interrupted)
    daemon, tensors = make_daemon(), some()
    with publisher(daemon) as pub:
        with pytest.raises(KeyboardInterrupt):
            pub.publish(tensors, 1)
        daemon.wait_for_message(Abandon)
        monkeypatch.setattr(Straight, "put", put)
        pub.publish(tensors, 2).staged(WAIT_SECONDS)
    assert daemon.last.tensors() == content(tensors)


def test_progress_that_raises_ends_the_wait_of_publish(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    daemon = make_daemon()
    daemon.script.keep_chunks = True
    with publisher(daemon) as pub:
        handle = pub.publish(some(), 1, progress=stop)
        with pytest.raises(PublishError, match="enough"):
            handle.staged(WAIT_SECONDS)
        daemon.wait_for_message(Abandon)
        daemon.give_back()
        pub.publish(some(), 2).staged(WAIT_SECONDS)


def test_tensors_that_change_meanwhile_never_pass_for_others(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of the trainer's: the digests of what it had then are not those of what it sent."""
    always(monkeypatch)
    put, digested = Straight.put, threading.Event()

    def note(kept: Straight, offset: int, chunk: InPlace) -> None:
        put(kept, offset, chunk)
        if offset == 3 * CHUNK:
            digested.set()

    monkeypatch.setattr(Straight, "put", note)
    daemon, tensors = make_daemon(), some()
    daemon.script.keep_chunks = True
    with publisher(daemon) as pub:
        thread, handles = in_thread(lambda: pub.publish(tensors, 1))
        daemon.wait_for_message(Chunk, 2)
        assert digested.wait(WAIT_SECONDS)  # and not sent before the daemon acknowledges the two
        tensors["b"].add_(1)
        daemon.give_back()
        thread.join(WAIT_SECONDS)
        with pytest.raises(DigestError, match="differ"):
            handles[0].staged(WAIT_SECONDS)


def test_tensors_are_let_go_when_publish_has_returned(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    tensor = torch.zeros(10 * CHUNK, dtype=torch.uint8)
    alive = weakref.ref(tensor)
    with publisher(make_daemon()) as pub:
        handle = pub.publish({"a": tensor}, 1)
        handle.staged(WAIT_SECONDS)
        del tensor
        gc.collect()
        assert alive() is None

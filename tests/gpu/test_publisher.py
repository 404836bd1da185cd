"""Tensors on real GPUs at the trainer: what arrives, when it is read, and what is page-locked meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor

from cpe_daemon.publisher import Publisher
from cpe_daemon.publisher.session import Session
from tests.unit.fake_daemon import WAIT_SECONDS, FakeDaemon
from tests.unit.tensor_zoo import bytes_of, tensor_of, zoo

pytestmark = pytest.mark.gpu

CHUNK_BYTES = 1 << 20

# The first frame that is sent without a copy starts pyzmq's own thread, which stays: not a leak of ours.
zmq.Frame(bytes(1 << 20), copy=False)

MakeDaemon = Callable[..., FakeDaemon]


@pytest.fixture
def make_daemon(runtime_dir: Path) -> Iterator[MakeDaemon]:
    daemons: list[FakeDaemon] = []

    def make(**terms: Any) -> FakeDaemon:
        daemons.append(FakeDaemon(runtime_dir, f"front{len(daemons)}", chunk_bytes=CHUNK_BYTES, **terms))
        return daemons[-1].start()

    yield make
    for daemon in daemons:
        daemon.stop()
    assert [violation for daemon in daemons for violation in daemon.violations] == []


def publisher(daemon: FakeDaemon) -> Publisher:
    torch.cuda.init()
    return Publisher(daemon.endpoint, model="m", run="r", connect_timeout=WAIT_SECONDS, send_timeout=WAIT_SECONDS)


def last_gpu() -> torch.device:
    """Not the thread's current one, where there are several."""
    return torch.device("cuda", torch.cuda.device_count() - 1)


def everywhere() -> dict[str, Tensor]:
    """Tensors of many sizes and kinds, on the host and on every GPU."""
    tensors = {name: tensor for name, tensor in zoo().items() if tensor.dtype is not torch.complex32}
    for at in range(12):
        tensors[f"large{at}"] = tensor_of("bfloat16", 1000 + at, 1500, seed=at)
        tensors[f"small{at}"] = tensor_of("float32", at + 1, seed=at)
    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    moved = {name: tensor.to(places[at % len(places)]) for at, (name, tensor) in enumerate(tensors.items())}
    moved["turned"] = tensor_of("int32", 700, 900).to(last_gpu()).t()
    moved["strided"] = tensor_of("float64", 500, 300).to(last_gpu())[::3, 1::2]
    return moved


def content(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes_of(tensor.cpu()) for name, tensor in tensors.items()}


def locked_session(pub: Publisher) -> Session:
    """The session of the only daemon, once its ring is page-locked: the link does that within a moment."""
    (link,) = pub._links
    moment = threading.Event()
    for _ in range(2000):
        session = link._session
        if session is not None and session.sending.page_lock is not None:
            return session
        moment.wait(0.01)
    raise AssertionError("the ring was not page-locked")


@pytest.mark.parametrize("iterator", [False, True])
@pytest.mark.parametrize("landing", [True, False])
def test_publish_delivers_what_is_on_any_device(
    no_leaks: None, make_daemon: MakeDaemon, landing: bool, iterator: bool
) -> None:
    tensors = everywhere()
    wanted = content(tensors)
    daemon = make_daemon(landing=landing)
    current = torch.cuda.current_device()
    with publisher(daemon) as pub:
        for version in (1, 2):
            pub.publish(iter(tensors.items()) if iterator else tensors, version).staged(WAIT_SECONDS)
            assert daemon.last.tensors() == wanted
    assert torch.cuda.current_device() == current


def test_ring_is_page_locked_from_attach_to_close(make_daemon: MakeDaemon) -> None:
    with publisher(make_daemon()) as pub:
        torch.ones(1, device=last_gpu())
        session = locked_session(pub)
        view = session.sending.window(0, CHUNK_BYTES).view
        ring = torch.frombuffer(view, dtype=torch.uint8)
        assert ring.is_pinned()
    assert not ring.is_pinned()


def test_publish_waits_for_kernels_on_the_current_stream(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    tensor = torch.zeros(8 * CHUNK_BYTES, dtype=torch.uint8, device=last_gpu())
    torch.cuda.synchronize(last_gpu())
    stream = torch.cuda.Stream(last_gpu())
    with publisher(daemon) as pub:
        locked_session(pub)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)  # a fraction of a second
            tensor.fill_(7)
            handle = pub.publish({"a": tensor}, 1)
        handle.staged(WAIT_SECONDS)
    assert daemon.last.tensors() == {"a": b"\7" * (8 * CHUNK_BYTES)}


@pytest.mark.parametrize("landing", [True, False])
def test_tensors_may_change_when_publish_has_returned(make_daemon: MakeDaemon, landing: bool) -> None:
    daemon = make_daemon(landing=landing)
    tensors = everywhere()
    wanted = content(tensors)
    with publisher(daemon) as pub:
        handle = pub.publish(tensors, 1)
        for tensor in tensors.values():
            if tensor.is_cuda:
                tensor.untyped_storage().fill_(0)  # type: ignore[attr-defined]
        handle.staged(WAIT_SECONDS)
    assert daemon.last.tensors() == wanted


def test_publish_takes_no_memory_of_the_gpu(make_daemon: MakeDaemon) -> None:
    tensors = {f"t{at}": tensor_of("bfloat16", 1000, 1500, seed=at).to(last_gpu()) for at in range(8)}
    with publisher(make_daemon()) as pub:
        locked_session(pub)
        torch.cuda.reset_peak_memory_stats(last_gpu())
        before = torch.cuda.memory_allocated(last_gpu())
        pub.publish(tensors, 1).staged(WAIT_SECONDS)
        assert torch.cuda.max_memory_allocated(last_gpu()) == before

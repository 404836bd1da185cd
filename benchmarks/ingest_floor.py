"""The floor of ingest, as ``python -m benchmarks.ingest_floor``: two bare processes that move the same bytes.

Nothing of ours is between them: no manifest, no session, no arena, no event loop. All memory has been touched before,
and both digest every tensor, with the same xxh3_128, in the order of the checkpoint.

``inline``: a DEALER sends frames of the size of our chunks, straight from the source's memory, with as many in flight
as we allow; a thread digests the tensors meanwhile. A ROUTER takes them, and a thread of its own copies each to its
place and digests it while it is in the cache.

``landing``: one process copies the source into a ring of shared memory and digests what it wrote; the other copies the
ring out and digests that. Two semaphores count free and full places.

It answers each line of its standard input with a line of JSON: the seconds of one run, until the receiver has digested
the last byte and found every digest equal to the sender's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import zmq
from xxhash import xxh3_128, xxh3_128_digest

from benchmarks.models import DENSE
from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Semaphore

_PIECE_BYTES: Final = 256 << 10
"""Copied and digested in one go, so that the digest reads the cache."""
_DIGEST_BYTES: Final = 16
_LOOK_MILLISECONDS: Final = 60_000
"""Whoever waits longer for the other side gives up."""
_DIFFERS: Final = b"differs"
_EQUAL: Final = b"equal"


@dataclass(frozen=True, slots=True)
class Terms:
    """What both sides know before they start.

    Attributes:
        sizes: bytes of each tensor.
        offsets: of each tensor in what is sent.
        nbytes: of all that is sent.
        chunk_bytes: size of a frame, or of a place of the ring.
        credits: frames in flight, or places.
    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    nbytes: int
    chunk_bytes: int
    credits: int

    @classmethod
    def of(cls, model: str, chunk_bytes: int, credits: int) -> Terms:
        """Lay a model's tensors out as we do, aligned and one after another."""
        shards = [Shard(spec.name, spec.dtype, spec.shape) for spec in DENSE[model].specs()]
        plan = layout(shards)
        return cls(tuple(shard.nbytes for shard in shards), plan.offsets, plan.nbytes, chunk_bytes, credits)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of each chunk."""
        for offset in range(0, self.nbytes, self.chunk_bytes):
            yield offset, min(self.chunk_bytes, self.nbytes - offset)


class Memory:
    """Touched memory of this process, or of it and its children."""

    def __init__(self, nbytes: int, value: int, *, shared: bool = False) -> None:
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self.view = memoryview(mmap.mmap(-1, nbytes, flags=flags | mmap.MAP_ANONYMOUS))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        ctypes.memset(self.address, value, nbytes)


@dataclass(slots=True)
class Digester:
    """Copies a stream of bytes piece by piece, and digests each tensor's where they arrived."""

    terms: Terms
    digests: bytearray = field(default_factory=bytearray)
    _hasher: xxh3_128 = field(default_factory=xxh3_128)
    _tensor: int = 0
    _at: int = 0

    def copy(self, memory: Memory, at: int, source: int, nbytes: int) -> None:
        """Copy the next ``nbytes`` of the stream from an address to ``at`` of ``memory``."""
        for start in range(0, nbytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, nbytes - start)
            ctypes.memmove(memory.address + at + start, source + start, size)
            self._digest(memory.view[at + start : at + start + size])

    def _digest(self, piece: memoryview) -> None:
        """Take the next bytes: those of a tensor to its digest, those between two of them to none."""
        begin, end = self._at, self._at + len(piece)
        self._at = end
        while self._tensor < len(self.terms.sizes):
            first = self.terms.offsets[self._tensor]
            last = first + self.terms.sizes[self._tensor]
            self._hasher.update(piece[max(first, begin) - begin : max(min(last, end), begin) - begin])
            if last > end:
                return
            self.digests += self._hasher.digest()
            self._hasher = xxh3_128()
            self._tensor += 1


# --- frames ----------------------------------------------------------------------------------------------------------


def _socket(kind: int, terms: Terms) -> zmq.Socket[bytes]:
    made: zmq.Socket[bytes] = zmq.Context(io_threads=1).socket(kind)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, 4 * terms.credits),
        (zmq.RCVHWM, 4 * terms.credits),
        (zmq.RCVTIMEO, _LOOK_MILLISECONDS),
    ):
        made.setsockopt(option, value)
    return made


def send_frames(endpoint: str, terms: Terms) -> Callable[[], float]:
    """Return what sends everything once."""
    source = Memory(terms.nbytes, 1)
    socket = _socket(zmq.DEALER, terms)
    socket.connect(endpoint)

    def once() -> float:
        digests: list[bytes] = []
        digesting = threading.Thread(target=lambda: digests.extend(_each(source.view, terms)))
        began = time.perf_counter()
        digesting.start()
        credits = terms.credits
        for offset, nbytes in terms.chunks():
            while not credits:
                socket.recv()
                credits += 1
            frame = zmq.Frame(source.view[offset : offset + nbytes], copy=False)
            socket.send_multipart([offset.to_bytes(8, "little"), frame])
            credits -= 1
        digesting.join()
        socket.send_multipart([b"".join(digests), b""])
        while (said := socket.recv()) not in (_EQUAL, _DIFFERS):
            continue
        return _checked(time.perf_counter() - began, said == _EQUAL)

    return once


def _each(view: memoryview, terms: Terms) -> Iterator[bytes]:
    for offset, nbytes in zip(terms.offsets, terms.sizes, strict=True):
        yield xxh3_128_digest(view[offset : offset + nbytes])


def take_frames(endpoint: str, terms: Terms, told: Connection) -> None:
    """Take everything, again and again, until the parent process ends this one."""
    target = Memory(terms.nbytes, 2)
    socket = _socket(zmq.ROUTER, terms)
    socket.setsockopt(zmq.RCVTIMEO, -1)
    socket.bind(endpoint)
    told.send_bytes(socket.getsockopt_string(zmq.LAST_ENDPOINT).encode())
    todo: queue.SimpleQueue[tuple[Digester, int, memoryview]] = queue.SimpleQueue()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    threading.Thread(target=_copy_frames, args=(target, todo, done), daemon=True).start()
    while True:
        digester, waiting = Digester(terms), 0
        while True:
            peer, head, body = socket.recv_multipart(copy=False)
            if len(head.bytes) != 8 or not len(body):
                break
            todo.put((digester, int.from_bytes(head.bytes, "little"), memoryview(body.buffer)))
            waiting += 1
            del body
            if waiting > 2:  # one is copied, one waits
                done.get()
                waiting -= 1
            socket.send_multipart([peer, b"go on"])
        for _ in range(waiting):
            done.get()
        socket.send_multipart([peer, _EQUAL if head.bytes == bytes(digester.digests) else _DIFFERS])


def _copy_frames(
    target: Memory,
    todo: queue.SimpleQueue[tuple[Digester, int, memoryview]],
    done: queue.SimpleQueue[None],
) -> None:
    while True:
        digester, offset, frame = todo.get()
        digester.copy(target, offset, ctypes.addressof(ctypes.c_char.from_buffer(frame)), len(frame))
        del frame
        done.put(None)


# --- a ring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ring:
    """Places of shared memory; ``answer`` follows the last one of a run."""

    memory: Memory
    digests: Memory
    free: Semaphore
    full: Semaphore
    answer: Semaphore
    equal: Memory


def fill_ring(ring: Ring, terms: Terms) -> Callable[[], float]:
    """Return what sends everything once."""
    source = Memory(terms.nbytes, 1)

    def once() -> float:
        digester = Digester(terms)
        began = time.perf_counter()
        for number, (offset, nbytes) in enumerate(terms.chunks()):
            _await(ring.free)
            digester.copy(ring.memory, number % terms.credits * terms.chunk_bytes, source.address + offset, nbytes)
            ring.full.release()
        ring.digests.view[: len(digester.digests)] = digester.digests
        ring.full.release()
        _await(ring.answer)
        return _checked(time.perf_counter() - began, ring.equal.view[0] == 1)

    return once


def empty_ring(ring: Ring, terms: Terms) -> None:
    """Take everything, again and again, until the parent process ends this one."""
    target = Memory(terms.nbytes, 2)
    while True:
        digester = Digester(terms)
        for number, (offset, nbytes) in enumerate(terms.chunks()):
            ring.full.acquire()
            place = number % terms.credits * terms.chunk_bytes
            digester.copy(target, offset, ring.memory.address + place, nbytes)
            ring.free.release()
        ring.full.acquire()
        ring.equal.view[0] = ring.digests.view[: len(digester.digests)] == digester.digests
        ring.answer.release()


def _await(semaphore: Semaphore) -> None:
    if not semaphore.acquire(timeout=_LOOK_MILLISECONDS / 1000):
        raise TimeoutError("the receiver of the floor does not go on")


def _checked(seconds: float, equal: bool) -> float:
    if not equal:
        raise ValueError("the floor's receiver digested other bytes than its sender")
    return seconds


# --- the process -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run once for each line of standard input, until it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(DENSE), required=True)
    parser.add_argument("--endpoint", required=True, help="ipc://PATH or tcp://HOST:PORT for frames, or 'landing'")
    parser.add_argument("--chunk-bytes", type=int, required=True)
    parser.add_argument("--credits", type=int, required=True)
    asked = parser.parse_args(arguments)
    terms = Terms.of(asked.model, asked.chunk_bytes, asked.credits)
    forked = multiprocessing.get_context("fork")  # no thread has been started yet
    if asked.endpoint == "landing":
        ring = Ring(
            Memory(terms.credits * terms.chunk_bytes, 3, shared=True),
            Memory(len(terms.sizes) * _DIGEST_BYTES, 0, shared=True),
            forked.Semaphore(terms.credits),
            forked.Semaphore(0),
            forked.Semaphore(0),
            Memory(1, 0, shared=True),
        )
        forked.Process(target=empty_ring, args=(ring, terms), daemon=True).start()
        once = fill_ring(ring, terms)
    else:
        heard, told = forked.Pipe(duplex=False)
        forked.Process(target=take_frames, args=(asked.endpoint, terms, told), daemon=True).start()
        once = send_frames(heard.recv_bytes().decode(), terms)
    _say({"ready": True, "bytes": sum(terms.sizes)})
    for _ in sys.stdin:
        _say({"seconds": once()})


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

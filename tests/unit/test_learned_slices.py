"""Ranks that are sent what they say they need, and garbage around it: in the end each holds the version, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cpe_daemon.core.manifest import Tensor as Placed
from cpe_daemon.core.needs import Needs
from cpe_daemon.core.plan import Bucket, Gpu, Topology
from cpe_daemon.core.types import VersionId, align
from cpe_daemon.push.planner import Planner
from cpe_daemon.wire.messages import Abort, Begin, Expect, Finish, Load, Pause, Resume, StepDone, TensorPart
from inference_plugins.learned.loading import spec_of
from tests.unit.loaders import MODELS, checkpoint, engine_of
from tests.unit.planning import ARENA, whole
from tests.unit.tensor_zoo import bytes_of
from tests.unit.test_learned_rounds import SECONDS, SLOT_BYTES, Worker, by_the_loader, held

GARBAGE = 0xEE


class Ranks:
    """An engine's workers, and what a daemon does with what they say."""

    def __init__(self, model: str, world_size: int, *, peer_access: bool) -> None:
        self.workers = [Worker(engine_of(MODELS[model], rank, world_size)) for rank in range(world_size)]
        self.needs: list[Needs | None] = [None] * world_size
        self.sent_bytes = self.whole_bytes = 0
        """Of the last version, to all ranks; and of all of it."""
        self._topology = Topology(tuple(Gpu(f"GPU-{rank}") for rank in range(world_size)), peer_access)
        self._planner = Planner(SLOT_BYTES)

    def push(self, number: int, tensors: Mapping[str, Tensor], *, buckets: int = 1 << 30) -> bool:
        """A round; whether every rank finished it. It is given up after so many buckets."""
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        nbytes, version = sum(tensor.nbytes for tensor in tensors.values()), VersionId("m", "r", number)
        arena, placed = bytearray(), list[Placed]()
        for spec, tensor in zip(specs, tensors.values(), strict=True):
            placed.append(whole(spec, len(arena)))
            arena += bytes_of(tensor).ljust(align(tensor.nbytes), b"\0")
        _, plan, schema = self._planner.plan("m", placed, ARENA, self._topology, [[needs] for needs in self.needs])
        everything, good = False, True
        for worker, needs in zip(self.workers, self.needs, strict=True):
            worker.steps.expect(Expect(number, 0, len(specs), specs))
            assert worker.do(Pause(number, SECONDS))
            digest = needs.digest if needs is not None and needs.schema == schema else ""
            begin = Begin(number, version, len(specs), nbytes, needs=digest)
            (begun,) = worker.steps.carry_out(begin, worker.slots)
            assert isinstance(begun, StepDone)
            everything |= begun.whole
        self.sent_bytes, self.whole_bytes = 0, nbytes * len(self.workers)
        for bucket in plan.buckets:
            good = good and bucket.index < buckets and self._load(number, placed, bucket, arena, everything=everything)
        if not good:
            assert all(worker.do(Abort(number, "given up")) for worker in self.workers)
            self.needs = [None] * len(self.needs)
            return False
        for rank, worker in enumerate(self.workers):
            (done,) = worker.steps.carry_out(Finish(number), worker.slots)
            assert isinstance(done, StepDone), done
            self.needs[rank] = done.needs or (None if everything else self.needs[rank])
            assert worker.do(Resume(number, version))
        return True

    def _load(self, number: int, placed: list[Placed], bucket: Bucket, arena: bytearray, *, everything: bool) -> bool:
        transfers = bucket.whole if everything or bucket.sliced is None else bucket.sliced
        slots = [bytearray([GARBAGE]) * SLOT_BYTES for _ in self.workers]
        for slot, pulls in zip(slots, transfers.pulls, strict=True):
            for copy in pulls:
                end = copy.slot_offset + copy.nbytes
                slot[copy.slot_offset : end] = arena[copy.address : copy.address + copy.nbytes]
                self.sent_bytes += copy.nbytes
        pulled = [bytes(slot) for slot in slots]
        for slot, exchanges in zip(slots, transfers.exchanges, strict=True):
            for item in exchanges:
                reached = slice(item.slot_offset, item.slot_offset + item.nbytes)
                slot[reached] = pulled[item.gpu][reached]
                self.sent_bytes += item.nbytes
        parts = [
            TensorPart(*_named(placed[part.tensor]), part.tensor_offset, part.nbytes, part.slot_offset)
            for part in bucket.parts
        ]
        loaded = []
        for worker, slot in zip(self.workers, slots, strict=True):
            worker.slots.content[:] = torch.frombuffer(slot, dtype=torch.uint8)
            loaded.append(worker.do(Load(number, bucket.index, 0, parts)))
        return all(loaded)

    def check(self, model: str, tensors: Mapping[str, Tensor]) -> None:
        for worker in self.workers:
            assert held(worker.engine) == by_the_loader(worker.engine, model, tensors)


def _named(tensor: Placed) -> tuple[str, str, tuple[int, ...]]:
    return tensor.spec.name, tensor.spec.dtype, tensor.spec.shape


@pytest.mark.parametrize("peer_access", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_twenty_versions_with_faults_are_right_on_every_rank(model: str, world_size: int, peer_access: bool) -> None:
    rng = random.Random(f"{model} {world_size} {peer_access}")
    ranks = Ranks(model, world_size, peer_access=peer_access)
    good, fewer = checkpoint(MODELS[model], 0), 0
    assert ranks.push(1, good)
    for number in range(2, 22):
        version = checkpoint(MODELS[model], number)
        fault = rng.choice(["", "", "", "engine", "given up", "moved", "relearn"])
        worker = rng.choice(ranks.workers)
        if fault == "engine":
            worker.target.learned.forget("so that the engine is called")
            worker.failing_in = rng.randrange(1, 12)
        elif fault == "moved":
            worker.engine.move(rng.choice([*worker.engine.parameters]))
        elif fault == "relearn":
            worker.target.learned.forget("a fault")
        buckets = rng.randrange(4) if fault == "given up" else 1 << 30
        if not ranks.push(10 * number, version, buckets=buckets):
            worker.failing_in = -1
            assert ranks.push(10 * number + 1, good)
            assert ranks.sent_bytes >= ranks.whole_bytes, "what restores an engine is whole"
            ranks.check(model, good)
            assert ranks.push(10 * number + 2, version)
        good = version
        worker.failing_in = -1
        fewer += ranks.sent_bytes < 0.95 * ranks.whole_bytes
        ranks.check(model, version)
    assert fewer > 3 if world_size > 1 else not fewer

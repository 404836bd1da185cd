"""A version that fails in the very turn of the loop in which its last rank has sealed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest
from xxhash import xxh3_128

from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.ingest.ingest import Ingest
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.versions import Catalogue
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Abandon,
    Chunk,
    ChunkDone,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    TrainerHello,
    VersionOpened,
)
from tests.unit.test_repeats import NoHandoff

V1 = VersionId("m", "r", 1)
W = Shard("w", "uint8", (4,))
PEER = b"t0"


class Sent:
    """What the trainer was told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._more = asyncio.Event()

    def send(self, peer: bytes, message: Message, *_: object) -> bool:
        assert peer == PEER
        self.messages.append(message)
        self._more.set()
        return True

    async def until(self, kind: type[Message]) -> None:
        async with asyncio.timeout(20):
            while not any(isinstance(message, kind) for message in self.messages):
                self._more.clear()
                await self._more.wait()


@pytest.mark.parametrize("how", ["abandon", "stop"])
async def test_version_that_fails_right_after_its_seal_ends_nothing_else(how: str) -> None:
    arena, sent, pool = Arena(1 << 16), Sent(), CopyPool(1, "copy")
    config = Config.model_validate({"runtime_dir": Path("/tmp/cpe-desk")})
    catalogue = Catalogue(arena, retain=1, clock=lambda: 0.0)
    trainers = Trainers(
        config=config,
        generation="g",
        boot_id="this host",
        handoff=cast("HandoffServer", NoHandoff()),
        metrics=Metrics(),
        clock=lambda: 0.0,
    )
    trainers.connect(sent)
    async with asyncio.TaskGroup() as tasks:
        ingest = Ingest(
            config=config,
            trainers=trainers,
            catalogue=catalogue,
            arena=arena,
            pool=pool,
            tasks=tasks,
            metrics=Metrics(),
            clock=lambda: 0.0,
        )
        handlers = {**trainers.handlers(), **ingest.handlers()}

        def say(message: Message, *frames: bytearray) -> None:
            handlers[type(message)](PEER, message, [memoryview(frame) for frame in frames])

        say(TrainerHello(PROTOCOL, "m", "r", 0, 1))
        say(OpenVersion(1, V1, 1, 256))
        say(ManifestPart(1, 0, [W]))
        await sent.until(VersionOpened)
        data = bytearray(256)
        say(Chunk(1, 0, 256), data)
        await sent.until(ChunkDone)
        version = catalogue.find(V1)
        say(Seal(1, xxh3_128(data[:4]).digest()))
        if how == "abandon":
            say(Abandon(1, "changed its mind"))
        else:
            ingest.stop("the daemon stops")
    assert version is not None
    assert (version.state, arena.free_bytes) == (VersionState.FAILED, arena.nbytes)
    pool.shutdown()
    arena.close()

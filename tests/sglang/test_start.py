"""How an SGLang server starts: what it loads, what it waits for, and that it does not wait for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpe_daemon.errors import CpeError
from tests.integration.processes import until
from tests.sglang.servers import ADMIN_KEY, KEY, START_SECONDS, Server
from tests.sglang.test_servers import agree
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, Trainer


def test_start_without_a_daemon_fails_at_its_deadline(
    daemon: Daemon, family: list[Checkpoint], all_faults: Faults, place: Path
) -> None:
    nowhere = {"CPE_ENGINES_SOCKET": str(place / "nowhere.sock"), "CPE_SGLANG_START_SECONDS": "2"}
    server = Server("alone", daemon, family[0], all_faults, place, environment=nowhere)
    try:
        server.start()
        assert server.wait(START_SECONDS) != 0
    finally:
        server.kill()
    said = server.log.read_text()
    assert "no version that may be served came within 2 s" in said
    assert "CPE_SGLANG_START=any serves" in said
    assert "The server is fired up" not in said


def test_server_with_dummy_weights_is_not_there_before_a_version_is(
    daemon: Daemon, family: list[Checkpoint], all_faults: Faults, place: Path
) -> None:
    """Nobody has published this model yet: the server waits, and answers nobody."""
    server = Server("early", daemon, family[0], all_faults, place, model="awaited", options={"--load-format": "dummy"})
    trainer = Trainer(daemon, "awaited")
    try:
        server.start()
        waits = "waiting for a version of the daemon's"
        until(lambda: server.ended or waits in server.log.read_text(), "it waits", START_SECONDS)
        for path in ("/ready", "/health", "/ping", "/model_info"):
            assert not server.answers(path)
        with pytest.raises(OSError, match="refused"):
            server.generate(seconds=5)
        assert not server.ended
        until(lambda: told_of("early", daemon) == ("starting", False), "the daemon does not call it ready either")
        trainer.publish(family[1])
        agree(server.ready(), family[1])
        assert told_of("early", daemon) == ("current", True)
    finally:
        trainer.close()
        server.kill()


def told_of(name: str, daemon: Daemon) -> tuple[str, bool]:
    """Which state `cpe status` gives an engine, and whether it calls it ready."""
    found = [engine for engine in daemon.status()["engines"] if engine["engine"] == name]
    return (found[0]["state"], found[0]["ready"]) if found else ("absent", False)


def test_tied_embedding_and_padded_vocabulary_and_a_start_from_disk_and_keys(
    daemon: Daemon, tied_family: list[Checkpoint], all_faults: Faults, place: Path
) -> None:
    """The daemon holds no version of this model: what is on disk is served until one comes."""
    old, new = tied_family
    settings = {"CPE_SGLANG_START": "disk"}
    keys = {"--api-key": KEY, "--admin-api-key": ADMIN_KEY}
    server = Server("tied", daemon, old, all_faults, place, model="tied", options=keys, environment=settings)
    trainer = Trainer(daemon, "tied")
    try:
        server.start()
        agree(server.ready(), old)
        for checkpoint in (new, old, new):
            assert not trainer.publish(checkpoint).behind
            agree(server, checkpoint)
        lacking = dict(old.tensors)
        del lacking["model.embed_tokens.weight"]
        with pytest.raises(CpeError, match=r"not all tensors came of model\.embed_tokens"):
            trainer.begin(lacking).live(timeout=LIVE_SECONDS)
        agree(server, new)
    finally:
        trainer.close()
        server.kill()

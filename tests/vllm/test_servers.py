"""Real vLLM servers on the CPU take versions from a real daemon, and serve what transformers computes of them.

The servers are shared: each test publishes what it needs, and leaves them serving the trainer's last version.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
import urllib.error
from typing import Any

import pytest
import torch

from cpe_daemon.errors import CpeError
from tests.integration.processes import until
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, Repeated, Server, Trainer, in_thread

LAYER = "model.layers.0."
FUSED = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
NAMES = [f"{LAYER}{name}.weight" for name in [*FUSED, "self_attn.o_proj", "mlp.down_proj", "input_layernorm"]]
NAMES += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_norm.weight"]


def agree(server: Server, checkpoint: Checkpoint) -> None:
    """See that a server computes what transformers did, tokens and about their logprobs."""
    tokens, logprobs = server.complete()
    assert tokens == checkpoint.tokens
    assert logprobs == pytest.approx(checkpoint.logprobs, abs=0.1)  # bfloat16


def other(trainer: Trainer, family: list[Checkpoint]) -> Checkpoint:
    """A checkpoint that is not live."""
    return next(checkpoint for checkpoint in family if checkpoint is not trainer.live)


# --- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_starts_with_the_live_version_whatever_its_disk_holds(
    one: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    assert trainer.live is family[1]
    agree(one, family[1])


@pytest.mark.essential
def test_server_of_two_workers_starts_with_the_live_version(
    two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    agree(two, trainer.live or family[1])


@pytest.mark.essential
def test_three_updates_of_two_servers_in_one_round(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    for checkpoint in (family[2], family[0], family[1]):
        report = trainer.publish(checkpoint)
        assert {name: engine.outcome for name, engine in report.engines.items()} == {"one": "updated", "two": "updated"}
        agree(one, checkpoint)
        agree(two, checkpoint)


@pytest.mark.essential
def test_request_in_flight_completes_across_an_update(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], faults: Faults
) -> None:
    """While the update hangs, the request waits in the paused server; neither ends before the other may."""
    new = other(trainer, family)
    faults.order("one", 0, "load", "hang")
    requests = Repeated(lambda: one.complete(tokens=120)[0])
    handle = trainer.begin(new.tensors)
    faults.reached()
    assert requests.stands()
    faults.clear()
    handle.live(timeout=LIVE_SECONDS)
    trainer.live = new
    assert {len(tokens) for tokens in requests.end()} == {120}
    agree(one, new)


@pytest.mark.parametrize("shown", [{"authorization": ""}, {"authorization": "Bearer wrong"}])
@pytest.mark.parametrize("call", [("/cpe/is_paused", None), ("/cpe/pause", {}), ("/cpe/resume", {})])
def test_our_routes_ask_for_the_server_s_key(one: Server, call: tuple[str, Any], shown: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        one.call(*call, headers=shown)
    assert json.loads(one.call("/cpe/is_paused"))["is_paused"] is False


def test_server_says_which_version_it_holds(two: Server, trainer: Trainer, family: list[Checkpoint]) -> None:
    report = trainer.publish(other(trainer, family))
    assert json.loads(two.call("/weight_info")) == {"weight_version": str(report.version)}


# --- versions that must not be taken ---------------------------------------------------------------------------------


@pytest.mark.essential
@pytest.mark.parametrize("name", NAMES)
def test_version_that_lacks_a_tensor_leaves_what_was_served(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], name: str
) -> None:
    poison = {key: tensor for key, tensor in other(trainer, family).tensors.items() if key != name}
    with pytest.raises(CpeError, match="not all tensors came of"):
        trainer.begin(poison).live(timeout=LIVE_SECONDS)
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)


@pytest.mark.parametrize("name", NAMES)
def test_version_with_a_tensor_of_another_shape_is_refused_before_a_pause(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], name: str
) -> None:
    """The loaders of fused and sharded modules would take their part of it."""
    poison = dict(other(trainer, family).tensors)
    poison[name] = torch.cat([poison[name]] * 2)
    pauses = one.log.read_text().count("/pause")
    with pytest.raises(CpeError, match=re.escape(f"{name} is [")):
        trainer.begin(poison).live(timeout=LIVE_SECONDS)
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)
    assert one.log.read_text().count("/pause") == pauses


@pytest.mark.essential
def test_next_good_version_is_taken(one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]) -> None:
    trainer.publish(other(trainer, family))
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)


@pytest.mark.essential
@pytest.mark.parametrize("step", ["load", "finish"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_fails_and_its_server_keeps_what_it_had(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], faults: Faults, rank: int, step: str
) -> None:
    before, new = trainer.live, other(trainer, family)
    assert before is not None
    faults.order("two", rank, step, "fail")
    report = trainer.publish(new)
    assert list(report.behind) == ["two"]
    agree(one, new)
    agree(two, before)
    trainer.publish(before)
    agree(one, before)
    agree(two, before)


def test_twenty_versions_and_five_poisoned_ones_while_requests_go_on(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    """No request fails, and each that comes after an update gets the new version's tokens."""
    over = threading.Event()

    def go_on_requesting(server: Server) -> int:
        requests = 0
        while not over.is_set():
            assert len(server.complete(tokens=40)[0]) == 40
            requests += 1
        return requests

    requests = [in_thread(functools.partial(go_on_requesting, server)) for server in (one, two)]
    try:
        for number in range(20):
            trainer.publish(other(trainer, family))
            assert trainer.live is not None
            if number % 4 == 3:
                lacks = NAMES[number // 4]
                poison = {name: tensor for name, tensor in family[0].tensors.items() if name != lacks}
                with pytest.raises(CpeError, match="not all tensors came of"):
                    trainer.begin(poison).live(timeout=LIVE_SECONDS)
            assert one.tokens() == two.tokens() == trainer.live.tokens
    finally:
        over.set()
    assert all(request.result(LIVE_SECONDS) for request in requests)


# --- processes that die ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["one", "two"])
def test_daemon_is_killed_in_an_update(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon, faults: Faults, engine: str
) -> None:
    new = other(trainer, family)
    faults.order(engine, 0, "load", "hang")
    lost = trainer.begin(new.tensors)
    faults.reached()
    daemon.kill()
    faults.clear()
    daemon.start()
    with pytest.raises(CpeError):
        lost.live(timeout=LIVE_SECONDS)
    trainer.publish(new)
    until(lambda: one.tokens() == new.tokens, "one serves the new version", LIVE_SECONDS)
    until(lambda: two.tokens() == new.tokens, "two serves the new version", LIVE_SECONDS)
    agree(one, new)
    agree(two, new)


def test_daemon_is_killed_before_anything_is_written(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon, faults: Faults
) -> None:
    """Another one finds that the servers hold what was live, and has them go on: nobody has to publish."""
    faults.order("two", 1, "begin", "hang")
    lost = trainer.begin(other(trainer, family).tensors)
    faults.reached()
    daemon.kill()
    faults.clear()
    daemon.start()
    with pytest.raises(CpeError):
        lost.live(timeout=LIVE_SECONDS)
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)


@pytest.mark.essential
def test_worker_is_killed_in_an_update_and_its_server_started_again(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon, faults: Faults
) -> None:
    """Only its own server ends; that comes up again with the live version."""
    new = other(trainer, family)
    faults.order("two", 1, "load", "hang")
    handle = trainer.begin(new.tensors)
    os.kill(faults.reached(), signal.SIGKILL)
    faults.clear()
    report = handle.live(timeout=LIVE_SECONDS)
    trainer.live = new
    assert list(report.behind) == ["two"]
    assert daemon.alive
    agree(one, new)
    until(lambda: two.ended, "the server ends whose worker was killed", LIVE_SECONDS)
    two.kill()
    two.start()
    two.ready()
    agree(two, new)
    trainer.publish(other(trainer, family))
    agree(two, trainer.live)

"""Real SGLang servers on the CPU take versions from a real daemon, and serve what transformers computes of them.

The servers are shared: each test publishes what it needs, and leaves them serving the trainer's last version.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import wait
from functools import partial
from typing import Any

import pytest
import torch

from cpe_daemon.errors import CpeError
from tests.integration.processes import until
from tests.sglang.servers import Server
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import LIVE_SECONDS, ROOT, Daemon, Faults, Repeated, Trainer, in_thread

UPDATES = 20
LAYER = "model.layers.0."
FUSED = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
NAMES = [f"{LAYER}{name}.weight" for name in [*FUSED, "self_attn.o_proj", "mlp.down_proj", "input_layernorm"]]
NAMES += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_norm.weight"]


def agree(server: Server, checkpoint: Checkpoint) -> None:
    """See that a server computes what transformers did, tokens and about their logprobs."""
    said = server.generate()
    assert said["output_ids"] == checkpoint.tokens
    logprobs = [logprob for logprob, *_ in said["meta_info"]["output_token_logprobs"]]
    assert logprobs == pytest.approx(checkpoint.logprobs, abs=0.1)  # bfloat16


def other(trainer: Trainer, family: list[Checkpoint]) -> Checkpoint:
    """A checkpoint that is not live."""
    return next(checkpoint for checkpoint in family if checkpoint is not trainer.live)


# --- updates ---------------------------------------------------------------------------------------------------------


def test_starts_with_the_live_version_whatever_it_loaded_itself(
    one: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    assert trainer.live is family[1]
    agree(one, family[1])
    until(lambda: version_of(one) == "policy@run#1", "the server says which version it serves")


def test_server_of_two_schedulers_starts_with_the_live_version(
    two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    agree(two, trainer.live or family[1])


def test_updates_of_two_servers_in_one_round_each(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    for index in range(UPDATES):
        checkpoint = family[index % 3]
        report = trainer.publish(checkpoint)
        assert {name: engine.outcome for name, engine in report.engines.items()} == {"one": "updated", "two": "updated"}
        agree(one, checkpoint)
        agree(two, checkpoint)
        assert version_of(one) == version_of(two)
    assert version_of(one) == f"policy@run#{UPDATES + 1}"


def test_most_tensors_are_copied_without_the_loader_by_then(one: Server, two: Server, daemon: Daemon) -> None:
    """Twenty updates were, then; norms are of few elements, and were seen with others."""
    for name in ("one", "two"):
        loading = engine_of(daemon, name)["loading"]
        assert loading["learned"] > 0
        assert (loading["unproven"], loading["kept"]) == (0, {})


def version_of(server: Server) -> str:
    return str(json.loads(server.call("/model_info"))["weight_version"])


def test_no_request_fails_while_versions_come_and_poisoned_ones_among_them(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    enough = threading.Event()

    def ask(server: Server) -> int:
        count = 0
        while not enough.is_set():
            said = server.generate(tokens=24)
            assert len(said["output_ids"]) == 24
            assert said["meta_info"]["finish_reason"]["type"] == "length"
            count += 1
        return count

    askers = [in_thread(partial(ask, server)) for server in (one, two)]
    try:
        for number in range(UPDATES):
            trainer.publish(other(trainer, family))
            if number % 4 == 3:
                poison = dict(other(trainer, family).tensors)
                del poison[NAMES[number // 4]]
                with pytest.raises(CpeError, match="not all tensors came of"):
                    trainer.begin(poison).live(timeout=LIVE_SECONDS)
    finally:
        enough.set()
    assert all(asker.result(LIVE_SECONDS) > 0 for asker in askers)
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)


def test_request_in_flight_completes_across_an_update(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], faults: Faults
) -> None:
    """While the update hangs, the request waits in the paused server; neither ends before the other may."""
    new = other(trainer, family)
    faults.order("two", 0, "load", "hang")
    requests = Repeated(lambda: two.generate(tokens=120))
    handle = trainer.begin(new.tensors)
    faults.reached()
    assert requests.stands()
    assert not two.answers("/ready")
    assert two.answers("/ping")
    faults.clear()
    handle.live(timeout=LIVE_SECONDS)
    trainer.live = new
    for said in requests.end():
        assert len(said["output_ids"]) == 120
        assert said["meta_info"]["finish_reason"]["type"] == "length"
    agree(one, new)
    agree(two, new)


def test_server_that_gave_its_memory_away_gets_the_live_version_when_it_has_it_again(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon
) -> None:
    one.call("/release_memory_occupation", {})
    until(lambda: "worker.asleep" in daemon.log.read_text(), "the daemon knows", LIVE_SECONDS)
    new = other(trainer, family)
    report = trainer.publish(new)
    assert report.engines["two"].outcome == "updated"
    one.call("/resume_memory_occupation", {})
    until(lambda: one.tokens() == new.tokens, "it has the live version", LIVE_SECONDS)
    agree(one, new)
    agree(two, new)


# --- versions that must not be taken ---------------------------------------------------------------------------------


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
    pauses = one.log.read_text().count("/pause_generation")
    with pytest.raises(CpeError, match=re.escape(f"{name} is [")):
        trainer.begin(poison).live(timeout=LIVE_SECONDS)
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)
    assert one.log.read_text().count("/pause_generation") == pauses


def test_version_with_other_names_leaves_what_was_served(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    """SGLang's loaders pass over most names that they do not know."""
    tensors = other(trainer, family).tensors
    poison = {f"policy.{name}" if "norm" in name else name: tensor for name, tensor in tensors.items()}
    with pytest.raises(CpeError, match="not all tensors came of"):
        trainer.begin(poison).live(timeout=LIVE_SECONDS)
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)


def test_next_good_version_is_taken(one: Server, two: Server, trainer: Trainer, family: list[Checkpoint]) -> None:
    trainer.publish(other(trainer, family))
    assert trainer.live is not None
    agree(one, trainer.live)
    agree(two, trainer.live)


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


def test_server_that_cannot_be_given_back_what_it_had_stays_paused_until_a_version_is_whole(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon, faults: Faults
) -> None:
    new = other(trainer, family)
    faults.order("two", 1, "finish", "fail always")
    report = trainer.publish(new)
    assert list(report.behind) == ["two"]
    until(lambda: engine_of(daemon, "two")["state"] == "quarantined", "it is given up", LIVE_SECONDS)
    agree(one, new)
    assert not two.answers("/ready")
    request = in_thread(two.tokens)
    assert not wait([request], 1.0).done
    faults.clear()
    newer = other(trainer, family)
    assert not trainer.publish(newer).behind
    assert len(request.result(LIVE_SECONDS)) == len(newer.tokens)
    agree(one, newer)
    agree(two, newer)


def engine_of(daemon: Daemon, name: str) -> dict[str, Any]:
    """What `cpe status` says of an engine."""
    found: dict[str, Any] = next(engine for engine in daemon.status()["engines"] if engine["engine"] == name)
    return found


def test_operator_rolls_back(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon
) -> None:
    before, new = trainer.live, other(trainer, family)
    assert before is not None
    trainer.publish(new)
    for held in (before, new):
        command = [sys.executable, "-m", "cpe_daemon", "rollback", "policy", "--runtime-dir", str(daemon.runtime_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIVE_SECONDS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        agree(one, held)
        agree(two, held)


# --- processes that die ----------------------------------------------------------------------------------------------


def test_server_whose_weights_are_mixed_does_not_go_on_whoever_asks(
    one: Server, two: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon, faults: Faults
) -> None:
    """Its daemon is killed in an update, and somebody tells the server to go on."""
    new = other(trainer, family)
    faults.order("two", 1, "load", "hang")
    lost = trainer.begin(new.tensors)
    faults.reached()
    daemon.kill()
    faults.clear()
    until(lambda: "an update was not taken" in two.log.read_text(), "the update is given up", LIVE_SECONDS)
    two.call("/continue_generation", {})
    until(lambda: "not going on: the weights may be a mixture" in two.log.read_text(), "it refuses", LIVE_SECONDS)
    request = in_thread(two.tokens)
    assert not wait([request], 1.0).done
    daemon.start()
    with pytest.raises(CpeError):
        lost.live(timeout=LIVE_SECONDS)
    trainer.publish(new)
    assert request.result(LIVE_SECONDS) == new.tokens
    until(lambda: one.tokens() == new.tokens, "one serves the new version", LIVE_SECONDS)
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


def test_scheduler_is_killed_in_an_update_and_its_server_started_again(
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
    until(lambda: two.ended, "the server ends whose scheduler was killed", LIVE_SECONDS)
    two.kill()
    two.start()
    two.ready()
    agree(two, new)
    trainer.publish(other(trainer, family))
    agree(two, trainer.live)

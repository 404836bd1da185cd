"""Several threads fill chunks at the trainer, and several copy and digest them at the daemon, which compares."""

from __future__ import annotations

import random

import pytest
import zmq

from cpe_daemon.publisher import Publisher
from cpe_daemon.publisher import publisher as publisher_module
from tests.integration.harness import MODEL, RUN, Node
from tests.unit.tensor_zoo import tensor_of, zoo

# The first frame that is sent without a copy starts pyzmq's own thread, which stays: not a leak of ours.
zmq.Frame(bytes(1 << 20), copy=False)

WAIT_SECONDS = 30.0
MIB = 1 << 20


@pytest.mark.parametrize("landing", [True, False], ids=["landing", "inline"])
def test_chunks_in_any_order_make_the_same_version(node: Node, landing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "threads_here", lambda: 4)
    node.start_daemon(arena__size_bytes="64MiB", ingest__copy_threads=4, ingest__landing_credits=8, device__verify=True)
    chance = random.Random(0)
    sizes = [9 * MIB, *(chance.randrange(2 * MIB) for _ in range(6)), *(chance.randrange(2000) for _ in range(500))]
    tensors = zoo() | {f"t{at}": tensor_of("uint8", nbytes, seed=at) for at, nbytes in enumerate(sizes)}
    with Publisher(node.daemon.front, model=MODEL, run=RUN, landing=landing) as publisher:
        for version in (1, 2, 3):
            publisher.publish(tensors, version).live(WAIT_SECONDS)  # the daemon compared every digest

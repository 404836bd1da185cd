"""Every listener under attack at once, while versions arrive; ``CPE_TEST_FUZZ_SECONDS=600`` is what a release gets.

`python -m tests.integration.fuzz_listeners --seconds 600` is the same without pytest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpe_daemon.wire.messages import FrontMessage, PushRequest, RollbackRequest
from tests.integration.attacks import Sayings
from tests.integration.fuzz_listeners import attack_listeners, two_nodes
from tests.integration.keyring import Keyring
from tests.integration.processes import Zygote

SECONDS = float(os.environ.get("CPE_TEST_FUZZ_SECONDS", "4"))


def test_attackers_that_are_let_in_do_not_have_engines_updated() -> None:
    """A daemon would do it, and an engine that is asked what it holds just then serves nothing: no fault of theirs."""
    let_in, shut_out = (Sayings("ipc:///nowhere", FrontMessage, trusted=trusted) for trusted in (True, False))
    for request in (PushRequest("policy"), RollbackRequest()):
        assert not let_in.may_say(request)
        assert shut_out.may_say(request)


@pytest.mark.timeout(SECONDS + 240)
def test_daemons_serve_while_every_listener_is_attacked(zygote: Zygote, no_leaks: None, runtime_dir: Path) -> None:
    with two_nodes(zygote, runtime_dir) as nodes:
        said = attack_listeners(nodes, Keyring(runtime_dir / "keys"), SECONDS, seed=1)
    assert len(said) == 6, f"each listener was attacked, not only {sorted(said)}"

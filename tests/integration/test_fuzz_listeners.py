"""Every listener under attack at once, while versions arrive; ``CPE_TEST_FUZZ_SECONDS=600`` is what a release gets.

`python -m tests.integration.fuzz_listeners --seconds 600` is the same without pytest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.fuzz_listeners import attack_listeners, two_nodes
from tests.integration.keyring import Keyring
from tests.integration.processes import Zygote

SECONDS = float(os.environ.get("CPE_TEST_FUZZ_SECONDS", "4"))


@pytest.mark.timeout(SECONDS + 240)
def test_daemons_serve_while_every_listener_is_attacked(zygote: Zygote, no_leaks: None, runtime_dir: Path) -> None:
    with two_nodes(zygote, runtime_dir) as nodes:
        said = attack_listeners(nodes, Keyring(runtime_dir / "keys"), SECONDS, seed=1)
    assert len(said) == 6, f"each listener was attacked, not only {sorted(said)}"

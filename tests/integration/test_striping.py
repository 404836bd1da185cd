"""A daemon says where its arena lies, or why nobody chose."""

from __future__ import annotations

import pytest

from tests.integration.harness import Node


@pytest.mark.parametrize(("setting", "reason"), [("auto", "no GPU pulls from it"), ("off", "arena.numa is off")])
def test_daemon_without_gpus_says_in_a_line_that_its_arena_is_not_striped(
    setting: str, reason: str, node: Node
) -> None:
    daemon = node.start_daemon(arena__numa=setting)
    assert daemon.status()["arena"]["numa"] == {"node_bytes": {}, "reason": reason}
    assert daemon.said.count("arena.not_striped") == 1

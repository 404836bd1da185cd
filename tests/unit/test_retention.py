"""What is said of room for the version before, and of which one a rollback would bring back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from cpe_daemon.cli.tables import rollback_text
from cpe_daemon.core.retention import shortage
from cpe_daemon.status import rollback_status
from tests.unit.fake_node import FakeNode, number

GIB = 1 << 30


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.mark.parametrize(("nbytes", "arena"), [(0, 1), (GIB, 2 * GIB), (GIB, 10 * GIB)])
def test_nothing_is_said_where_two_versions_fit(nbytes: int, arena: int) -> None:
    assert shortage("m", nbytes, arena) == ""


def test_shortage_says_what_follows_and_the_mend() -> None:
    said = shortage("policy", 2 * GIB, 4 * GIB - 1)
    assert "the arena of 4.00 GiB cannot hold two versions of policy, of 2.00 GiB each: N-1 cannot be kept" in said
    assert "a failed push can be restored, and a version rolled back, only by publishing it anew" in said
    assert said.endswith("Set arena.size_bytes to 4.00 GiB at least, or better 6.00 GiB")
    assert "of 6 bytes" in shortage("policy", 4, 6)


async def test_status_tells_what_a_rollback_would_bring_back() -> None:
    async with FakeNode.running(retain=2) as node:
        assert rollback_status(node.catalogue) == []
        await node.publish(number(1))
        await node.publish(number(1, "other"))
        await node.publish(number(2))
        node.clock.now += 1.0
        await node.publish(number(3))
        told = rollback_status(node.catalogue)
        assert told == [
            {"model": "other", "live": "other@r#1", "to": None},
            {"model": "m", "live": "m@r#3", "to": "m@r#2"},
        ]
        assert rollback_text({"rollback": told}) == "other@r#1: nothing is retained\nm@r#3 → m@r#2"
    assert rollback_text({}) == ""
    assert rollback_text({"rollback": [{"live": "\x1b[2J"}, 3]}) == "\N{REPLACEMENT CHARACTER}[2J: nothing is retained"

"""How engines load is told by their workers, kept by the daemon, and shown."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from msgspec.structs import replace

from cpe_daemon.cli.tables import engine_columns
from cpe_daemon.status import engines_status
from cpe_daemon.wire.messages import Finish, StepDone
from cpe_daemon.wire.reports import LoadingReport
from inference_plugins.learned import Report
from tests.unit.fake_node import FakeNode, FakeWorker, number

KEPT = {"converted to float32": 2, "padded": 1}
FEWEST = LoadingReport(learned=7, unproven=1, kept=KEPT, digest="d")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def learning(worker: FakeWorker, report: LoadingReport) -> None:
    """Have a worker say how it loads."""

    def finish(step: Finish) -> StepDone:
        done = worker.do(step)
        assert isinstance(done, StepDone)
        return replace(done, loading=report)

    worker.script["finish"] = finish


async def test_engine_is_shown_with_the_worker_that_has_learned_fewest() -> None:
    async with FakeNode.running() as node:
        learning(node.worker("a", rank=0, world_size=2), LoadingReport(learned=11))
        learning(node.worker("a", rank=1, world_size=2), FEWEST)
        node.worker("b")
        await node.publish(number(1))
        status = {row["engine"]: row["loading"] for row in engines_status(node.registry)}
        assert status == {"a": {"learned": 7, "unproven": 1, "kept": KEPT, "digest": "d"}, "b": None}


@pytest.mark.parametrize(
    ("loading", "text"),
    [
        (None, "-"),
        ({"learned": 7, "unproven": 1, "kept": KEPT}, "7 of 11 (converted to float32)"),
        ({"learned": 7, "unproven": 0, "kept": {}}, "7 of 7"),
    ],
)
def test_table_of_engines_shows_what_is_learned(loading: object, text: str) -> None:
    column = engine_columns({})["learned"]
    assert callable(column)
    assert column({"engine": "a", "loading": loading}) == text


def test_daemon_is_told_of_the_most_frequent_reasons_and_no_endless_ones() -> None:
    many = Report(learned=1, kept={f"{at:02} {'x' * 200}": at for at in range(1, 30)})
    told = many.as_message()
    assert list(told.kept.values()) == list(range(29, 13, -1))
    assert {len(reason) for reason in told.kept} == {80}

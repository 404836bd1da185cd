"""What a trace holds: the stages of every bucket in their order, one track a stage and GPU, in a format others read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpe_daemon.errors import ConfigError
from cpe_daemon.push.trace import Trace, recording
from tests.unit.fake_node import Clock, FakeNode, number


async def traced_push(gpus: int) -> Trace:
    async with FakeNode.running(gpus=gpus) as node:
        trace = node.pusher.traffic.trace = Trace()
        for rank in range(gpus):
            node.worker("a", rank=rank, world_size=gpus)
        await node.publish(number(1))
        return trace


def slices(trace: Trace) -> Iterator[dict[str, Any]]:
    """As they are written, with their track's name."""
    written = json.loads(json.dumps(trace.events()))["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in written if event["name"] == "thread_name"}
    assert len(set(tracks.values())) == len(tracks)
    for event in written:
        if event["ph"] == "X":
            yield event | {"track": tracks[event["tid"]], "end": event["ts"] + event["dur"]}


@pytest.mark.parametrize("gpus", [1, 2])
async def test_stages_of_a_bucket_follow_one_another(gpus: int) -> None:
    found = list(slices(await traced_push(gpus)))
    for bucket in range(3):
        of_it = {event["track"]: event for event in found if event["name"] == f"bucket {bucket}"}
        fetches, exchanges = ([e for track, e in of_it.items() if track.endswith(s)] for s in ("fetch", "exchange"))
        loads = [event for track, event in of_it.items() if ": load by a rank " in track]
        assert len(fetches) == gpus
        assert len(exchanges) == (gpus if gpus > 1 else 0)
        for exchange in exchanges:
            assert exchange["ts"] >= max(fetch["end"] for fetch in fetches)
        assert len(loads) == gpus
        for load in loads:
            assert load["ts"] >= max(event["end"] for event in exchanges or fetches)
        assert len({event["args"]["slot"] for event in of_it.values()}) == 1


async def test_slices_of_a_track_do_not_overlap() -> None:
    found = list(slices(await traced_push(2)))
    for track in {event["track"] for event in found}:
        mine = sorted((event for event in found if event["track"] == track), key=lambda event: float(event["ts"]))
        assert all(after["ts"] >= before["end"] - 0.002 for before, after in itertools.pairwise(mine))


async def test_round_is_shown_state_by_state() -> None:
    states = [event["name"] for event in slices(await traced_push(1)) if event["track"] == "rounds"]
    assert states == ["prefetching", "pausing", "streaming", "finishing", "resuming"]


async def test_nothing_is_recorded_unless_asked_for() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        await node.publish(number(1))
        assert node.pusher.traffic.trace is None


def test_slice_begins_when_the_one_before_it_has_ended() -> None:
    clock = Clock()
    trace = Trace(clock)
    asked = clock.now
    clock.now += 1.0
    trace.add("track", "first", asked)
    clock.now += 2.0
    trace.add("track", "second", asked)
    assert [(kept.begin - asked, kept.end - asked) for kept in trace.slices] == [(0.0, 1.0), (1.0, 3.0)]


def test_oldest_slices_are_forgotten() -> None:
    trace = Trace(Clock(), kept=2)
    for name in "abc":
        trace.add("track", name, 0.0)
    assert [kept.name for kept in trace.slices] == ["b", "c"]


def test_recording_is_written_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with recording(path) as trace:
        if trace is not None:
            trace.add("track", "name", 0.0)
    assert [event["ph"] for event in json.loads(path.read_text())["traceEvents"]] == ["M", "M", "X"]


def test_recording_where_nothing_can_be_written_is_refused_before_anything_begins(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="No such file or directory"),
        recording(tmp_path / "missing" / "trace.json"),
    ):
        pytest.fail("it began")


def test_no_path_records_nothing() -> None:
    with recording(None) as trace:
        assert trace is None

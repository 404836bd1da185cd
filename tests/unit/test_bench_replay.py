"""The benchmark of replays, small: what it copies is what it says, and it says it when something is wrong."""

from __future__ import annotations

import json

import pytest

from benchmarks import replay


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_SETS", ((600, 64 << 10), (800, 16 << 10)))
    monkeypatch.setattr(replay, "_BUCKET_BYTES", 300 << 10)


def test_last_line_has_both_sets_and_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    replay.main(["--runs", "2"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["bench"], last["device"], last["bar"], last["wrong"]) == ("replay", "CPU", replay.BAR, 0)
    assert last["ratios"].keys() == last["first_seconds"].keys() == {"6 x 64 KiB", "8 x 16 KiB"}
    assert last["ratio"] == max(last["ratios"].values())
    assert len(last["seconds"]) == len(last["floor_seconds"]) == 2


def test_tensors_that_were_not_copied_are_counted() -> None:
    model = replay.Model(replay.Device("cpu"), 40, 16 << 10)
    assert len(model.buckets) > 1
    assert model.wrong() == 40
    assert replay.measure(replay.Device("cpu"), model, 1).wrong == 0
    model.forget()
    assert model.wrong() == 40

"""The commands of operators: push, engine, status --watch, and what a shell completes them by."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from rich.console import Console

from cpe_daemon.cli import main
from cpe_daemon.cli.tables import VERSION_COLUMNS, lag_text, push_text
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import BusyError, CpeError, DeadlineError, MisuseError, PeerLostError
from cpe_daemon.wire.messages import (
    Done,
    EngineAdd,
    EngineRemove,
    EngineSpec,
    Message,
    PushReply,
    PushRequest,
    StatusReply,
    StatusRequest,
)
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport
from tests.unit.front_door import front_door
from tests.unit.test_cli import STATUS

VERSION = VersionId("qwen3", "r1", 7)
UPDATED = EngineReport("updated", {"pause": 0.001, "push": 0.1}, 4_000, 0.00004)
ROUND: dict[str, Any] = {
    "number": 3,
    "version": "qwen3@r1#8",
    "phase": "streaming",
    "seconds": 1.25,
    "nbytes": 1 << 30,
    "loaded_bytes": 1 << 29,
    "engines": ["a", "b"],
    "dropped": ["c"],
}
WORKING: dict[str, Any] = {
    **STATUS,
    "readiness": {"ready": False, "reasons": [{"code": "x", "message": "engine e0 is quarantined"}], "warnings": []},
    "push": {"automatic": False, "waiting": 2, "round": ROUND},
    "versions": [
        {**STATUS["versions"][0], "number": 6, "state": "failed", "error": "its trainer is gone"},
        STATUS["versions"][0],
        {**STATUS["versions"][0], "number": 9, "state": "staged"},
    ],
    "trainers": [
        {
            "model": "qwen3",
            "run": "r1",
            "rank": 0,
            "world_size": 2,
            "transport": "landing",
            "version": "qwen3@r1#10",
            "received_bytes": 1 << 29,
            "total_bytes": 1 << 30,
        }
    ],
}


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


def cpe(*arguments: str | Path, **environ: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environ)


def report(**engines: EngineReport) -> VersionReport:
    return VersionReport(VERSION, 4_000, 3, 1.5, 0.25, engines)


@pytest.fixture
def endpoint(no_leaks: None, runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/front.sock"


def pushing(
    endpoint: str, answer: Callable[[PushRequest], Message | None], status: dict[str, Any] | None = None
) -> Any:
    """A daemon that answers pushes so, and tells its status."""
    told = STATUS if status is None else status
    return front_door(endpoint, {PushRequest: answer, StatusRequest: lambda _: StatusReply(told)})


# --- push ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ([], PushRequest("")),
        (["policy"], PushRequest("policy")),
        (["org/policy-v1.5@run-7#12"], PushRequest("org/policy-v1.5", "run-7", 12)),
        (["policy#0"], PushRequest("policy", "", 0)),
        (["policy@run-7"], PushRequest("policy", "run-7")),
        (["policy", "--engine", "a", "--engine", "b"], PushRequest("policy", engines=("a", "b"))),
    ],
)
def test_push_asks_for_what_was_said(words: list[str], request_: PushRequest, endpoint: str) -> None:
    with pushing(endpoint, lambda _: PushReply(report(a=UPDATED))) as heard:
        result = cpe("push", *words, "--to", endpoint)
    assert result.exit_code == 0, result.output
    assert [message for message in heard if isinstance(message, PushRequest)] == [request_]


@pytest.mark.parametrize("words", ["#7", "@r#7", "m#x", "m@#7", "m@r#7#8", "m#-1"])
def test_push_of_what_is_no_version_is_refused_before_anybody_is_asked(words: str) -> None:
    result = cpe("push", words, "--to", "ipc:///nowhere")
    assert result.exit_code == 2
    assert "is not MODEL, MODEL@RUN#NUMBER or MODEL#NUMBER" in result.stderr


def test_push_reports_each_engine(endpoint: str) -> None:
    with pushing(endpoint, lambda _: PushReply(report(a=UPDATED, b=EngineReport("current")))):
        result = cpe("push", "--to", endpoint)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "qwen3@r1#7: 3 tensors, 4.00 kB, 0.250 s",
        "engine  outcome  size     rate        phases",
        "a       updated  4.00 kB  40.00 kB/s  pause 0.001 s, push 0.100 s",
        "b       current  -        -           holds it already",
    ]


def test_push_in_json_has_every_field(endpoint: str) -> None:
    with pushing(endpoint, lambda _: PushReply(report(a=UPDATED))):
        result = cpe("push", "--json", "--to", endpoint)
    shown = json.loads(result.stdout)
    assert shown["version"] == {"model": "qwen3", "run": "r1", "number": 7}
    assert shown["engines"]["a"] == {
        "outcome": "updated",
        "phases": {"pause": 0.001, "push": 0.1},
        "nbytes": 4_000,
        "gigabytes_per_second": 0.00004,
        "error": None,
        "verified": False,
    }


def test_push_that_an_engine_did_not_take_fails_with_the_reason(endpoint: str) -> None:
    kept = EngineReport("kept", error=ErrorInfo("deadline", "the pass does not end"))
    with pushing(endpoint, lambda _: PushReply(report(a=UPDATED, **{"b\x1b[2J": kept}))):
        result = cpe("push", "--to", endpoint)
    assert result.exit_code == 7
    assert "a       updated" in result.stdout
    assert "\x1b" not in result.stdout
    assert "(kept): the pass does not end" in result.stderr


def test_push_without_engines_says_so(endpoint: str) -> None:
    with pushing(endpoint, lambda _: PushReply(report())):
        result = cpe("push", "--to", endpoint)
    assert result.exit_code == 0
    assert result.stderr == "note: no engine of qwen3 is attached; the first that attaches gets it\n"


def test_push_that_left_an_engine_asleep_has_done_its_work(endpoint: str) -> None:
    asleep = EngineReport("asleep", error=ErrorInfo("engine", "engine 'b' is asleep"))
    with pushing(endpoint, lambda _: PushReply(report(a=UPDATED, b=asleep))):
        result = cpe("push", "--to", endpoint)
    assert result.exit_code == 0
    assert "engine 'b' is asleep" in result.output


def test_dry_run_asks_for_nothing_else_and_tells_who_fits(endpoint: str) -> None:
    with pushing(endpoint, lambda _: PushReply(report(a=EngineReport("fits")))) as heard:
        result = cpe("push", "--dry-run", "qwen3", "--engine", "a", "--to", endpoint)
    assert result.exit_code == 0
    assert [m for m in heard if isinstance(m, PushRequest)] == [PushRequest("qwen3", engines=("a",), dry_run=True)]
    assert "a       fits" in result.stdout


@pytest.mark.parametrize("outcome", ["differs", "unanswered", "absent", "asleep"])
def test_dry_run_fails_unless_the_version_fits_every_engine(outcome: str, endpoint: str) -> None:
    bad = EngineReport(outcome, error=ErrorInfo("manifest", "no tensor here is called w"))
    with pushing(endpoint, lambda _: PushReply(report(a=EngineReport("fits"), b=bad))):
        result = cpe("push", "--dry-run", "--to", endpoint)
    assert result.exit_code not in (0, 2)
    assert f"does not fit every engine: b ({outcome}): no tensor here is called w" in result.stderr


def test_push_that_is_refused_keeps_the_daemon_s_code(endpoint: str) -> None:
    def refuse(_: PushRequest) -> Message:
        raise MisuseError("qwen3@r1#6 is retained")

    with pushing(endpoint, refuse):
        result = cpe("push", "qwen3@r1#6", "--to", endpoint)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "error: qwen3@r1#6 is retained  [misuse]\n"


def test_push_that_takes_too_long_goes_on(endpoint: str) -> None:
    with pushing(endpoint, lambda _: None):
        result = cpe("push", "--timeout", "2", "--to", endpoint)
    assert result.exit_code == 5
    assert "did not end within 2 s" in result.stderr
    assert "goes on with it" in result.stderr


def test_push_at_a_daemon_that_was_restarted_does_not_wait_for_an_answer(endpoint: str) -> None:
    generations = itertools.count()

    def status(_: StatusRequest) -> Message:
        return StatusReply({"daemon": {"generation": f"g{next(generations)}"}})

    with front_door(endpoint, {PushRequest: lambda _: None, StatusRequest: status}):
        result = cpe("push", "--timeout", "60", "--to", endpoint)
    assert result.exit_code == 4
    assert "was restarted before it had answered" in result.stderr


@pytest.mark.parametrize(
    ("push", "text"),
    [
        ({}, "idle"),
        ({"automatic": True, "waiting": 0, "round": None}, "idle"),
        (
            WORKING["push"],
            "qwen3@r1#8 into a, b (c dropped): streaming, 512.00 MiB of 1.00 GiB loaded, 1.2 s; 2 more to come;"
            " qwen3@r1#9 waits for `cpe push`",
        ),
        ({"round": {"engines": 7}}, "- into -: -, - of - loaded, -"),
    ],
)
def test_push_is_told_in_a_line(push: dict[str, Any], text: str) -> None:
    assert push_text({**WORKING, "push": push}) == text


# --- engine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "spec"),
    [
        (["e", "--kind", "torch"], EngineSpec("e", "torch")),
        (
            ["v", "--kind", "vllm", "--model", "m", "--url", "http://127.0.0.1:8000", "--world-size", "8"],
            EngineSpec("v", "vllm", "m", "http://127.0.0.1:8000", 8),
        ),
    ],
)
def test_engine_add_and_remove_tell_what_the_daemon_says(words: list[str], spec: EngineSpec, endpoint: str) -> None:
    with front_door(endpoint, {EngineAdd: lambda _: Done("added"), EngineRemove: lambda _: Done("removed")}) as heard:
        added = cpe("engine", "add", *words, "--to", endpoint)
        removed = cpe("engine", "remove", spec.name, "--to", endpoint)
    assert (added.exit_code, added.stdout) == (0, "added\n")
    assert (removed.exit_code, removed.stdout) == (0, "removed\n")
    assert heard == [EngineAdd(spec), EngineRemove(spec.name)]


def test_engine_add_names_the_plugins_that_ship() -> None:
    text = cpe("engine", "add", "--help").stdout
    ours = [found.name for found in entry_points(group="cpe_daemon.engines") if found.value.startswith("inference_")]
    assert sorted(ours) == ["sglang", "torch", "vllm"]
    assert [name for name in ours if f"--kind {name}" not in text and f" {name}," not in text] == []


def test_engine_add_that_is_refused_says_why(endpoint: str) -> None:
    def refuse(_: EngineAdd) -> Message:
        raise MisuseError("no plugin for engines of kind 'vllm' is installed; there is: torch")

    with front_door(endpoint, {EngineAdd: refuse}):
        result = cpe("engine", "add", "v", "--kind", "vllm", "--to", endpoint)
    assert result.exit_code == 3
    assert "there is: torch  [misuse]" in result.stderr


def test_engine_list_shows_those_that_are_expected_and_not_there(endpoint: str) -> None:
    absent = {
        "engine": "later",
        "kind": "torch",
        "model": "",
        "state": "unknown",
        "ready": False,
        "expected": True,
        "url": "http://127.0.0.1:8000",
        "world_size": 0,
        "workers": [],
        "error": "expected, but none of its workers has attached",
    }
    status = {**STATUS, "engines": [*STATUS["engines"], absent]}
    with front_door(endpoint, {StatusRequest: lambda _: StatusReply(status)}):
        shown = cpe("engine", "list", "--to", endpoint)
        plain = cpe("engine", "list", "--json", "--to", endpoint)
    assert shown.exit_code == 0, shown.output
    for text in ("later", "0 of ?", "http://127.0.0.1:8000", "none of its workers", "quarantined"):
        assert text in shown.stdout
    listed = {engine["engine"]: engine for engine in json.loads(plain.stdout)}
    assert listed["later"]["expected"] is True
    assert listed["later"]["content"] is None


def test_engine_without_a_subcommand_shows_them() -> None:
    assert "add " in cpe("engine", "--help").output
    for name in ("add", "remove", "list"):
        result = cpe("engine", name, "--help")
        assert result.exit_code == 0
        assert "\b" not in result.output


# --- status --watch --------------------------------------------------------------------------------------------------

Look = dict[str, Any] | CpeError
LINKS: list[str] = []
"""What became of the links of the last watch."""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `cpe status --watch` at a daemon that says this and that, until somebody presses Ctrl-C."""

    def run(said: list[Look], *words: str) -> Result:
        left = iter(said)
        LINKS.clear()

        class Said:
            def __init__(self, _: object) -> None:
                LINKS.append("opened")

            def __enter__(self) -> Said:
                return self

            def __exit__(self, *_: object) -> None:
                LINKS.append("closed")

            def status(self, _: float) -> dict[str, Any]:
                look = next(left, None)
                if look is None:
                    raise KeyboardInterrupt
                if isinstance(look, CpeError):
                    raise look
                return look

        monkeypatch.setattr("cpe_daemon.cli.watch.Conversation", Said)
        return cpe("status", "--watch", "--interval", "0.1", "--to", "ipc:///x", *words)

    return run


AWAY = PeerLostError("no daemon listens at ipc:///x")


def test_watch_shows_a_node_at_work(looks: Callable[..., Result]) -> None:
    result = looks([WORKING])
    assert result.exit_code == 0, result.output
    for text in (
        "gpu-17: cpe-daemon 9.9.9, pid 4242, up 1 d 2 h",
        "qwen3@r1#8 into a, b (c dropped): streaming",
        "1.00 GiB of 4.00 GiB used, 1.00 GiB free in one run",
        "engine e0 is quarantined",
        "Engines: 1 quarantined",
        "holds none",
        "512.00 MiB of 1.00 GiB",
        "its trainer is gone",
        "rank 1 is gone",
    ):
        assert text in result.stdout
    assert "\x1b" not in result.stdout


def test_watch_waits_for_a_daemon_that_is_away(looks: Callable[..., Result]) -> None:
    result = looks([STATUS, AWAY, AWAY, DeadlineError("it did not send its status"), STATUS])
    assert result.exit_code == 0
    assert result.stdout.count("waiting for the daemon at ipc:///x: no daemon listens") == 1
    assert "it did not send" not in result.stdout, "it is still away: that was said"
    assert result.stdout.count("gpu-17: cpe-daemon") == 2


def test_watch_keeps_its_link_until_that_is_not_answered(looks: Callable[..., Result]) -> None:
    looks([STATUS] * 3)
    assert LINKS == ["opened", "closed"]
    looks([STATUS, STATUS, AWAY, STATUS, STATUS])
    assert LINKS == ["opened", "closed"] * 2


def test_watch_in_json_is_one_object_a_line(looks: Callable[..., Result]) -> None:
    result = looks([STATUS, AWAY, AWAY, WORKING], "--json")
    assert result.exit_code == 0
    first, away, last = (json.loads(line) for line in result.stdout.splitlines())
    assert (first, last) == (STATUS, WORKING)
    assert away == {"error": {"code": "peer_lost", "message": "no daemon listens at ipc:///x"}}


def test_watch_ends_where_the_daemon_refuses_to_tell(looks: Callable[..., Result]) -> None:
    result = looks([STATUS, BusyError("no")])
    assert (result.exit_code, result.stderr) == (6, "error: no  [busy]\n")


@pytest.mark.parametrize("status", [{}, {"push": 7, "engines": [{}], "arena": {"size_bytes": 0}, "readiness": []}])
def test_watch_shows_what_another_release_says(status: dict[str, Any], looks: Callable[..., Result]) -> None:
    result = looks([status])
    assert result.exit_code == 0, result.output


def test_watch_on_a_terminal_has_a_screen_of_its_own(
    looks: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, height=24, markup=False)
    monkeypatch.setattr("cpe_daemon.cli.tables.console", lambda _: terminal)
    result = looks([AWAY, WORKING, AWAY])
    assert result.exit_code == 0
    shown = screen.getvalue()
    assert shown.count("\x1b[?1049h") == shown.count("\x1b[?1049l") == 1
    first, working, last = shown.split("waiting for the daemon")
    assert "gpu-17" not in first
    assert "gpu-17: cpe-daemon" in working
    assert "What it said last:" in last
    assert "gpu-17: cpe-daemon" in last


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ("qwen3@r1#9", "0"),
        ("qwen3@r1#7", "2"),
        ("qwen3@r1#11", "0"),
        ("qwen3@r0#7", "another run"),
        ("qwen3@r1#x", "another run"),
        (None, "holds none"),
        (7, "another run"),
    ],
)
def test_lag_is_counted_from_the_newest_that_is_staged(held: object, text: str) -> None:
    assert lag_text(WORKING, {"model": "qwen3", "content": held}) == text


def test_engine_is_behind_a_version_that_failed_in_its_push() -> None:
    """As the metric has it, which is of the version that was staged last, whatever became of it."""

    def row(number: int, state: str, age: float, staging: float) -> dict[str, Any]:
        return {
            "model": "m", "run": "r", "number": number, "state": state, "age_seconds": age, "stage_seconds": staging
        }  # fmt: skip

    engine = {"model": "m", "content": "m@r#1"}
    versions = [row(1, "live", 90.0, 1.0), row(2, "failed", 60.0, 1.0), row(3, "failed", 30.0, 0.0)]
    assert lag_text({"versions": versions}, engine) == "1", "3 was never whole here"
    versions.append(row(4, "receiving", 9.0, 0.0))
    assert lag_text({"versions": versions}, engine) == "1"
    versions.insert(0, row(5, "evicted", 80.0, 79.0))
    assert lag_text({"versions": versions}, engine) == "4", "it was staged last, though it was opened before 2"


def test_version_whose_bytes_are_gone_has_no_sizes() -> None:
    gone = {"state": "evicted", "nbytes": 0, "tensors": 0, "ranks_sealed": 0, "world_size": 1}
    kept = {"state": "live", "nbytes": 8, "tensors": 1, "ranks_sealed": 1, "world_size": 1}

    def shown(row: dict[str, Any]) -> list[object]:
        cells = [VERSION_COLUMNS[name] for name in ("size", "tensors", "ranks")]
        return [cell(row) for cell in cells if callable(cell)]

    assert (shown(gone), shown(kept)) == (["-", "-", "-"], ["8 B", "1", "1 of 1"])


def test_lag_is_unknown_where_nothing_is_staged() -> None:
    assert lag_text(WORKING, {"model": "other", "content": "other@r#1"}) == "-"
    assert lag_text({}, {}) == "-"


# --- completion ------------------------------------------------------------------------------------------------------


def complete(*words: str) -> list[str]:
    """What a shell would offer for the last word."""
    *before, incomplete = words
    completion = ShellComplete(main, {}, "cpe", "_CPE_COMPLETE")
    return [item.value for item in completion.get_completions(list(before), incomplete)]


def test_names_of_a_running_daemon_are_completed(endpoint: str, runtime_dir: Path) -> None:
    engines = [{"engine": "e0", "model": "qwen3"}, {"engine": "v0", "model": "other"}]
    with front_door(endpoint, {StatusRequest: lambda _: StatusReply({**WORKING, "engines": engines})}):
        assert complete("push", "--to", endpoint, "--engine", "") == ["e0", "v0"]
        assert complete("push", "--to", endpoint, "--engine", "v") == ["v0"]
        assert complete("push", "--to", endpoint, "q") == ["qwen3", "qwen3@r1#7", "qwen3@r1#9"]
        assert complete("engine", "remove", "--runtime-dir", str(runtime_dir), "e") == ["e0"]
        assert complete("engine", "add", "x", "--to", endpoint, "--model", "") == ["other", "qwen3"]
    assert complete("engine", "add", "x", "--kind", "to") == ["torch"]


@pytest.mark.parametrize("status", [{}, {"engines": [7], "versions": None}])
def test_completion_of_a_daemon_that_says_nonsense_offers_nothing(status: dict[str, Any], endpoint: str) -> None:
    with front_door(endpoint, {StatusRequest: lambda _: StatusReply(status)}):
        assert complete("push", "--to", endpoint, "--engine", "") == []
        assert complete("push", "--to", endpoint, "") == []


def test_completion_without_a_daemon_offers_nothing_and_says_nothing(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete("push", "--runtime-dir", str(runtime_dir), "") == []
    assert complete("push", "--to", "no endpoint", "") == []
    completion = importlib.import_module("cpe_daemon.cli.completion")
    monkeypatch.setattr(completion, "_ASK_SECONDS", 0.05)
    (runtime_dir / "front.sock").touch()
    assert complete("push", "--runtime-dir", str(runtime_dir), "") == []
    assert capsys.readouterr() == ("", "")

"""``cpe rollback`` and ``cpe wait``: what they ask for, what they print, and how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from cpe_daemon.cli import main, wait
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, MisuseError, PeerLostError
from cpe_daemon.wire.messages import (
    Message,
    PushReply,
    RollbackRequest,
    StatusReply,
    StatusRequest,
    WaitReply,
    WaitRequest,
)
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport
from tests.unit.front_door import front_door
from tests.unit.test_cli import STATUS

VERSION = VersionId("qwen3", "r1", 6)
REPORT = VersionReport(VERSION, 4_000, 3, 1.5, 0.25, {"a": EngineReport("updated", {"push": 0.1}, 4_000, 0.00004)})
RETAINED = {
    **STATUS,
    "versions": [
        {**STATUS["versions"][0], "number": 5, "state": "retained"},
        {**STATUS["versions"][0], "number": 6, "run": "r2", "state": "retained"},
        {**STATUS["versions"][0], "number": 9, "model": "other", "state": "retained"},
        STATUS["versions"][0],
    ],
}


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def endpoint(no_leaks: None, runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/front.sock"


def cpe(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def rolling(endpoint: str, answer: VersionReport | Exception) -> Any:
    def roll(_: RollbackRequest) -> Message:
        if isinstance(answer, Exception):
            raise answer
        return PushReply(answer)

    return front_door(endpoint, {RollbackRequest: roll, StatusRequest: lambda _: StatusReply(STATUS)})


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ([], RollbackRequest()),
        (["qwen3"], RollbackRequest("qwen3")),
        (["org/qwen3@r1"], RollbackRequest("org/qwen3", "r1")),
        (["qwen3", "--to", "0"], RollbackRequest("qwen3", "", 0)),
    ],
)
def test_rollback_asks_for_what_was_said(words: list[str], request_: RollbackRequest, endpoint: str) -> None:
    with rolling(endpoint, REPORT) as heard:
        result = cpe("rollback", *words, "--at", endpoint)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("qwen3@r1#6: 3 tensors, 4.00 kB, 0.250 s\n")
    assert "a       updated" in result.stdout
    assert [message for message in heard if isinstance(message, RollbackRequest)] == [request_]


@pytest.mark.parametrize("words", [["m#7"], ["@r"], ["m@"], ["m", "--to", "-1"], ["m", "--to", "x"]])
def test_rollback_of_what_is_no_model_is_refused_before_anybody_is_asked(words: list[str]) -> None:
    assert cpe("rollback", *words, "--at", "ipc:///nowhere").exit_code == 2


def test_rollback_in_json_is_the_report(endpoint: str) -> None:
    with rolling(endpoint, REPORT):
        shown = json.loads(cpe("rollback", "--json", "--at", endpoint).stdout)
    assert (shown["version"]["number"], shown["engines"]["a"]["outcome"], shown["note"]) == (6, "updated", "")


def test_rollback_that_has_nothing_to_do_says_so(endpoint: str) -> None:
    note = "qwen3@r1#6 is live already: nothing was pushed"
    with rolling(endpoint, VersionReport(VERSION, 4_000, 3, note=note)):
        result = cpe("rollback", "--to", "6", "--at", endpoint)
    assert (result.exit_code, result.stderr) == (0, f"note: {note}\n")


def test_rollback_that_an_engine_did_not_take_fails_with_the_reason(endpoint: str) -> None:
    kept = EngineReport("kept", error=ErrorInfo("deadline", "the pass does not end"))
    with rolling(endpoint, VersionReport(VERSION, 4_000, 3, engines={"a": kept})):
        result = cpe("rollback", "--at", endpoint)
    assert result.exit_code == 7
    assert "a (kept): the pass does not end" in result.stderr


def test_rollback_that_is_refused_keeps_the_daemon_s_words(endpoint: str) -> None:
    with rolling(endpoint, MisuseError("no version of qwen3 is retained here")):
        result = cpe("rollback", "--at", endpoint)
    assert (result.exit_code, result.stderr) == (3, "error: no version of qwen3 is retained here  [misuse]\n")


@pytest.mark.parametrize(
    ("words", "incomplete", "offered"),
    [
        (["rollback"], "", ["other", "other@r1", "qwen3", "qwen3@r1", "qwen3@r2"]),
        (["rollback", "qwen3", "--to"], "", ["5", "6"]),
        (["rollback", "qwen3@r2", "--to"], "", ["6"]),
        (["wait"], "q", ["qwen3"]),
    ],
)
def test_names_are_completed(
    words: list[str], incomplete: str, offered: list[str], runtime_dir: Path, endpoint: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("CPE_RUNTIME_DIR", str(runtime_dir))
    with front_door(endpoint, {StatusRequest: lambda _: StatusReply(RETAINED)}):
        found = ShellComplete(main, {}, "cpe", "_CPE_COMPLETE").get_completions(words, incomplete)
    assert [item.value for item in found] == offered


# --- wait ------------------------------------------------------------------------------------------------------------


def test_wait_prints_which_version_is_live(endpoint: str) -> None:
    with front_door(endpoint, {WaitRequest: lambda _: WaitReply(VERSION)}) as heard:
        result = cpe("wait", "qwen3@r1", "--version", "5", "--timeout", "7", "--to", endpoint)
    assert (result.exit_code, result.stdout) == (0, "qwen3@r1#6\n")
    (asked,) = heard
    assert isinstance(asked, WaitRequest)
    assert (asked.model, asked.run, asked.number) == ("qwen3", "r1", 5)
    assert 5.0 < asked.seconds <= 7.0


def test_wait_in_json_is_the_version(endpoint: str) -> None:
    with front_door(endpoint, {WaitRequest: lambda _: WaitReply(VERSION)}):
        result = cpe("wait", "--version", "5", "--json", "--to", endpoint)
    assert json.loads(result.stdout) == {"model": "qwen3", "run": "r1", "number": 6}


@pytest.mark.parametrize(
    ("error", "status"),
    [(DeadlineError("m#5 is not live after 1 s: m@r#5 is staged"), 5), (PeerLostError("m@r#5 has failed: gone"), 4)],
)
def test_wait_that_comes_to_nothing_says_why(error: Exception, status: int, endpoint: str) -> None:
    def refuse(_: WaitRequest) -> Message:
        raise error

    with front_door(endpoint, {WaitRequest: refuse}):
        result = cpe("wait", "--version", "5", "--timeout", "1", "--to", endpoint)
    assert result.exit_code == status
    assert str(error) in result.stderr


def test_wait_is_said_again_while_nothing_is_heard(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpe_daemon.wire.operator.WAIT_AGAIN_SECONDS", 0.05)
    asked: list[WaitRequest] = []

    def answer(request: WaitRequest) -> Message | None:
        asked.append(request)
        return WaitReply(VERSION) if len(asked) == 3 else None

    with front_door(endpoint, {WaitRequest: answer}):
        assert cpe("wait", "--version", "5", "--to", endpoint).exit_code == 0
    assert asked[0].seconds > asked[1].seconds > asked[2].seconds


def test_wait_for_a_daemon_that_does_not_answer_ends(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_ANSWER_SECONDS", 1.0)
    with front_door(endpoint, {WaitRequest: lambda _: None}):
        result = cpe("wait", "--version", "5", "--timeout", "1", "--to", endpoint)
    assert result.exit_code == 5
    assert "did not answer within 1 s" in result.stderr


def test_wait_where_no_daemon_listens_fails_at_once(runtime_dir: Path) -> None:
    result = cpe("wait", "--version", "5", "--runtime-dir", str(runtime_dir))
    assert result.exit_code == 4
    assert "no daemon listens" in result.stderr

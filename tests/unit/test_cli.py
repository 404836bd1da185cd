"""The command: what it prints where, and how it fails."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import click
import pytest
import yaml
import zmq
from click.testing import CliRunner, Result

import cpe_daemon.publisher
from cpe_daemon import __version__, errors
from cpe_daemon.cli import main
from cpe_daemon.cli.failures import exit_status
from cpe_daemon.cli.tables import columns
from cpe_daemon.cli.text import bytes_text, seconds_text
from cpe_daemon.config import Config, annotated_default
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import BusyError, CpeError, DeadlineError, EngineError
from cpe_daemon.links.router import Router
from cpe_daemon.publisher.report import PublishReport
from cpe_daemon.wire.messages import FrontMessage, Message, StatusReply, StatusRequest
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport

STATUS: dict[str, Any] = {
    "daemon": {
        "version": "9.9.9",
        "node": "gpu-17",
        "pid": 4242,
        "generation": "f00d",
        "uptime_seconds": 93_784.2,
        "protocol": 1,
        "endpoints": ["ipc:///run/cpe/front.sock", "tcp://0.0.0.0:5555"],
    },
    "arena": {
        "size_bytes": 4 << 30,
        "free_bytes": 3 << 30,
        "largest_free_bytes": 1 << 30,
        "prefaulted": False,
    },
    "device": {"kind": "shm", "gpus": [{"uuid": "shm-0", "slots": 3, "slot_bytes": 256 << 20}]},
    "versions": [
        {
            "model": "qwen3",
            "run": "r1",
            "number": 7,
            "state": "live",
            "nbytes": 1_500_000_000,
            "tensors": 311,
            "ranks_sealed": 2,
            "world_size": 2,
            "age_seconds": 12.0,
            "error": None,
        }
    ],
    "engines": [
        {
            "engine": "e\x1b[2J0",
            "model": "qwen3",
            "kind": "torch",
            "state": "quarantined",
            "ready": False,
            "content": None,
            "world_size": 2,
            "workers": [{"rank": 0, "pid": 1, "node": "gpu-17", "gpu": "shm-0", "present": True}],
            "error": "rank 1 is gone",
            "last_push_seconds": 0.152,
        }
    ],
    "trainers": [],
    "counters": {'cpe_failures_total{code="digest"}': 2.0, "cpe_trainers": 0.0},
}


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


def cpe(*arguments: str | Path, **environ: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environ)


@contextmanager
def listening(endpoint: str, answer: Callable[[], Message | None]) -> Iterator[None]:
    """Run a daemon's front door that knows one question; `answer` may raise, or return None to keep silent."""
    ready, ending = threading.Event(), threading.Event()

    async def serve() -> None:
        with zmq.Context() as context:

            def reply(peer: bytes, _message: StatusRequest, _frames: Sequence[memoryview]) -> None:
                message = answer()
                if message is not None:
                    router.send(peer, message)

            router = Router(
                "front",
                context,
                accepts=FrontMessage,
                handlers={StatusRequest: reply},
                max_frame_bytes=1 << 20,
            )
            router.bind(endpoint)
            router.start()
            ready.set()
            await asyncio.to_thread(ending.wait, 60)
            router.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        ending.set()
        thread.join(10)


# --- help and version ----------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cpe_daemon.cli import main; main(['--help'], standalone_mode=False);"
        "print('heavy:', *sorted({'torch', 'zmq', 'pydantic', 'rich', 'asyncio', 'uvloop'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)], ids=lambda words: " ".join(words))
def test_every_command_explains_itself(command: list[str]) -> None:
    result = cpe(*command, "--help")
    assert result.exit_code == 0
    assert "\b" not in result.output
    options = main.commands[command[0]].params if command else []
    for option in options:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_help_names_every_exit_status() -> None:
    shown = cpe("--help").output
    assert all(f"{status}  " in shown for status in (0, 1, 2, 3, 4, 5, 6, 7, 130))


def test_python_dash_m_is_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cpe_daemon", "version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout == f"cpe-daemon {__version__} (protocol 1)\n"


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef cpe"), ("fish", "complete --no-files")]
)
def test_completion_is_for_this_command(shell: str, word: str) -> None:
    result = cpe("completion", shell)
    assert result.exit_code == 0
    assert word in result.output
    assert "_CPE_COMPLETE" in result.output


def test_version_as_json_has_the_protocols() -> None:
    told = json.loads(cpe("version", "--json").stdout)
    assert (told["version"], told["oldest_protocol"] <= told["protocol"]) == (__version__, True)


def test_tables_are_as_wide_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, width in (("80", 80), ("", 200), ("x", 200), ("0", 200)):
        monkeypatch.setenv("COLUMNS", said)
        assert columns(io.StringIO()) == width


def test_demo_takes_one_size() -> None:
    refused = cpe("demo", "--small", "--scale", "0.5")
    assert refused.exit_code == 2
    assert "either --small or --scale" in refused.stderr


def test_help_of_force_says_what_it_does_not_do() -> None:
    shown = " ".join(cpe("publish", "--help").output.split())
    assert "Return to a run that another has superseded. Numbers grow all the same." in shown


# --- failing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConfigError("x"), 2),
        (errors.VersionRefusedError("x"), 3),
        (errors.ProtocolError("x"), 4),
        (errors.PeerLostError("x"), 4),
        (errors.DigestError("x"), 4),
        (errors.DeadlineError("x"), 5),
        (errors.ArenaFullError("x"), 6),
        (errors.EngineError("x"), 7),
        (errors.PublishError("x"), 7),
        (errors.CpeError("x"), 1),
        (ValueError("x"), 1),
    ],
)
def test_exit_status_follows_the_family(error: Exception, status: int) -> None:
    assert exit_status(error) == status


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `cpe serve` with a daemon that raises."""

    def run(error: BaseException, *arguments: str, **environ: str) -> Result:
        async def serve(_config: Config, _trace: object) -> None:
            raise error

        module = types.ModuleType("cpe_daemon.daemon")
        module.serve = serve  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cpe_daemon.daemon", module)
        monkeypatch.setattr("cpe_daemon.observe.logs.configure_logging", lambda *_: None)
        return cpe(*arguments, "serve", **environ)

    return run


def test_error_is_one_line_with_its_code(failing: Callable[..., Result]) -> None:
    result = failing(BusyError("another daemon runs here"))
    assert (result.exit_code, result.stdout) == (6, "")
    assert result.stderr == "error: another daemon runs here  [busy]\n"


def test_bundled_errors_are_written_one_by_one(failing: Callable[..., Result]) -> None:
    inner = ExceptionGroup("inner", [DeadlineError("no worker")])
    result = failing(ExceptionGroup("outer", [inner, EngineError("e0 is broken")]))
    assert result.exit_code == 7
    assert result.stderr == "error: no worker  [deadline]\nerror: e0 is broken  [engine]\n"


def test_bug_says_how_to_find_it(failing: Callable[..., Result]) -> None:
    result = failing(ZeroDivisionError("by zero"))
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected ZeroDivisionError: by zero; --debug shows where  [internal]\n"
    for shown in (failing(ZeroDivisionError("x"), "--debug"), failing(ZeroDivisionError("x"), CPE_DEBUG="1")):
        assert "Traceback (most recent call last)" in shown.stderr


def test_interrupt_has_its_own_status(failing: Callable[..., Result]) -> None:
    result = failing(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_wrong_option_shows_usage() -> None:
    result = cpe("status", "--jsno")
    assert result.exit_code == 2
    assert "--json" in result.stderr


# --- config and serve ----------------------------------------------------------------------------


def test_config_default_is_the_annotated_default() -> None:
    assert cpe("config", "--default").stdout == annotated_default()


def test_config_shows_what_is_in_effect(tmp_path: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text("device:\n  slots: 5\n")
    result = cpe("config", "--set", "device.gpus=2", "--runtime-dir", "/run/x", CPE_CONFIG=str(path))
    assert result.exit_code == 0
    shown = yaml.safe_load(result.stdout)
    assert (shown["device"]["slots"], shown["device"]["gpus"], shown["runtime_dir"]) == (5, 2, "/run/x")
    assert f"# {path}:2" in result.stdout
    parsed = json.loads(cpe("config", "--json", CPE_CONFIG=str(path)).stdout)
    assert parsed["arena"]["size_bytes"] == 4 << 30


def test_config_reports_all_problems(tmp_path: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text("device:\n  slots: -1\nlog:\n  level: loud\n")
    result = cpe("config", "--config", path)
    assert (result.exit_code, result.stdout) == (2, "")
    first, *more = result.stderr.splitlines()
    assert first == "error: 2 problems in the configuration:  [config]"
    assert [line.split(": ")[:2] for line in more] == [
        [f"  {path}:2", "device.slots"],
        [f"  {path}:4", "log.level"],
    ]


def test_runtime_dir_may_be_relative_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cpe("config", "--runtime-dir", "run")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["runtime_dir"] == str(tmp_path / "run")


def test_set_without_value_is_refused() -> None:
    result = cpe("config", "--set", "device.slots")
    assert result.exit_code == 2
    assert "KEY=VALUE" in result.stderr


def test_serve_hands_the_configuration_to_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Config, str]] = []

    async def serve(config: Config, _trace: object) -> None:
        seen.append((config, type(asyncio.get_running_loop()).__module__))

    module = types.ModuleType("cpe_daemon.daemon")
    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cpe_daemon.daemon", module)
    configured: list[tuple[str, str]] = []
    monkeypatch.setattr("cpe_daemon.observe.logs.configure_logging", lambda *terms: configured.append(terms))
    result = cpe("serve", "--set", "log.level=debug", "--runtime-dir", "/run/x", CPE_DEVICE__SLOTS="4")
    assert result.exit_code == 0, result.output
    ((config, loop),) = seen
    assert (config.device.slots, config.runtime_dir, loop) == (4, Path("/run/x"), "uvloop")
    assert configured == [("debug", "auto")]


# --- publish ---------------------------------------------------------------------------------------------------------


class FakePublisher:
    """Stands for `cpe_daemon.publisher.Publisher`, and is its own handle."""

    made: ClassVar[list[dict[str, Any]]] = []
    fails: ClassVar[CpeError | None] = None
    stays: ClassVar[str] = ""
    engines: ClassVar[dict[str, EngineReport]] = {"e0": EngineReport("updated", {"load": 0.5})}
    held: ClassVar[list[str]] = []

    def __init__(self, endpoints: list[str], **terms: Any) -> None:
        self.calls: dict[str, Any] = {"endpoints": endpoints, **terms}
        self.made.append(self.calls)
        self.version = VersionId(terms["model"], terms["run"], 0)
        self.state = "receiving"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls["closed"] = True

    def publish(
        self, source: Path, version: int, *, force: bool, progress: Callable[[int, int], None]
    ) -> FakePublisher:
        self.version = VersionId(self.version.model, self.version.run, version)
        self.calls |= {"source": source, "force": force}
        progress(1, 2)
        progress(2, 2)
        self.state = "failed" if self.fails else "staged"
        return self

    def staged(self, timeout: float) -> None:
        self.calls["staged"] = timeout
        if self.fails:
            raise self.fails

    def live(self, timeout: float) -> PublishReport:
        self.calls["live"] = timeout
        if self.stays:
            self.state = self.stays
            raise DeadlineError(f"{self.version} is not live after {timeout:g} s")
        node = VersionReport(self.version, 10, 1, engines=self.engines)
        return PublishReport(self.version, {"ipc:///x": node}, tuple(self.held))


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> type[FakePublisher]:
    """Put the fake in the place of the real one."""
    module = types.ModuleType("cpe_daemon.publisher")
    module.Publisher = FakePublisher  # type: ignore[attr-defined]
    module.__path__ = cpe_daemon.publisher.__path__
    monkeypatch.setattr("cpe_daemon.cli.publish.look_for_daemon", lambda endpoint: None)
    monkeypatch.setitem(sys.modules, "cpe_daemon.publisher", module)
    monkeypatch.setattr(FakePublisher, "made", [])
    monkeypatch.setattr(FakePublisher, "fails", None)
    return FakePublisher


def test_publish_without_a_daemon_fails_at_once_as_every_command_does(tmp_path: Path, runtime_dir: Path) -> None:
    for where in (["--runtime-dir", runtime_dir], ["--to", f"ipc://{runtime_dir}/front.sock"], ["--to", runtime_dir]):
        result = cpe("publish", tmp_path, "--model", "m", "--version", "7", *where)
        assert result.exit_code == 4
        assert f"no daemon listens at ipc://{runtime_dir}/front.sock; is `cpe serve` running" in result.stderr


@pytest.mark.parametrize("endpoint", ["foo", "tcp://127.0.0.1", "tcp://127.0.0.1:x"])
@pytest.mark.parametrize("command", [("status",), ("publish", ".", "--model", "m", "--version", "1")])
def test_what_is_no_endpoint_is_refused_with_how_to_write_one(command: tuple[str, ...], endpoint: str) -> None:
    result = cpe(*command, "--to", endpoint)
    assert result.exit_code == 2
    assert "write tcp://ADDRESS:PORT" in result.stderr


def test_publish_waits_until_live_and_reports(publisher: type[FakePublisher], tmp_path: Path) -> None:
    result = cpe(
        "publish", tmp_path, "--model", "m", "--version", "7", "--to", "ipc:///x", "--run", "r", "--force", "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["version"] == {"model": "m", "run": "r", "number": 7}
    assert report["state"] == "live"
    assert report["held"] == []
    engine = report["nodes"]["ipc:///x"]["engines"]["e0"]
    assert engine["phases"] == {"load": 0.5}
    assert engine["error"] is None, "fields at their defaults are there too"
    assert result.stderr == ""
    (calls,) = publisher.made
    assert (calls["endpoints"], calls["source"], calls["force"]) == (["ipc:///x"], tmp_path, True)
    assert calls["closed"]


@pytest.mark.parametrize("wait", ["staged", "live"])
def test_publish_of_what_is_held_already_says_so(
    wait: str, publisher: type[FakePublisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "held", ["ipc:///x"])
    words = ("publish", tmp_path, "--model", "m", "--version", "7", "--wait", wait)
    result = cpe(*words)
    assert result.exit_code == 0, result.output
    assert result.stderr == "note: ipc:///x held m@manual#7 already, with the same bytes: nothing was sent\n"
    assert ("(held there already: nothing was sent)" in result.stdout) is (wait == "live")
    assert json.loads(cpe(*words, "--json").stdout)["held"] == ["ipc:///x"]


@pytest.mark.parametrize(("state", "hinted"), [("staged", True), ("pushing", False)])
def test_publish_hints_at_push_where_the_version_waits(
    state: str, hinted: bool, publisher: type[FakePublisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "stays", state)
    result = cpe("publish", tmp_path, "--model", "m", "--version", "7", "--timeout", "9")
    assert result.exit_code == 5
    assert "m@manual#7 is not live after 9 s" in result.stderr
    assert ("push.automatic: false there, it waits for `cpe push m`" in result.stderr) is hinted


@pytest.mark.parametrize(
    ("wait", "staged", "live"), [("none", False, False), ("staged", True, False), ("live", True, True)]
)
def test_publish_waits_no_longer_than_asked(
    wait: str, staged: bool, live: bool, publisher: type[FakePublisher], tmp_path: Path
) -> None:
    result = cpe("publish", tmp_path, "--model", "m", "--version", "7", "--wait", wait, "--timeout", "9")
    assert result.exit_code == 0, result.output
    (calls,) = publisher.made
    assert (calls.get("staged"), calls.get("live")) == (9.0 if staged else None, 9.0 if live else None)
    if wait != "live":
        assert result.stdout == f"m@manual#7 is {'sent' if wait == 'none' else 'staged'}\n"


def test_publish_that_an_engine_did_not_take_fails(
    publisher: type[FakePublisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = EngineReport("kept", error=ErrorInfo("engine", "no tensor here is called v"))
    monkeypatch.setattr(publisher, "engines", {"e0": EngineReport("updated"), "e1": kept})
    result = cpe("publish", tmp_path, "--model", "m", "--version", "7", "--json")
    assert result.exit_code == 7
    assert "e1 (kept): no tensor here is called v" in result.stderr
    assert set(json.loads(result.stdout)["nodes"]["ipc:///x"]["engines"]) == {"e0", "e1"}


def test_publish_that_reached_no_engine_says_so(
    publisher: type[FakePublisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "engines", {})
    result = cpe("publish", tmp_path, "--model", "m", "--version", "7", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["nodes"]["ipc:///x"]["engines"] == {}
    assert result.stderr.startswith("note: no engine of m is attached; the first that attaches gets it. ")
    assert "`cpe evict m` forgets it" in result.stderr


def test_publish_goes_to_the_daemon_of_this_node(publisher: type[FakePublisher], tmp_path: Path) -> None:
    cpe("publish", tmp_path, "--model", "m", "--version", "7", "--wait", "none", CPE_RUNTIME_DIR="/run/x")
    assert publisher.made[0]["endpoints"] == ["ipc:///run/x/front.sock"]


@pytest.mark.parametrize("wait", ["none", "staged"])
def test_publish_that_fails_says_why(
    wait: str, publisher: type[FakePublisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "fails", errors.DigestError("w differs"))
    result = cpe("publish", tmp_path, "--model", "m", "--version", "7", "--wait", wait, "--json")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "error: w differs  [digest]\n"


def test_publish_refuses_what_makes_no_sense(publisher: type[FakePublisher], tmp_path: Path) -> None:
    words = ("publish", tmp_path, "--model", "m", "--version", "7")
    assert cpe(*words, "--rank", "2", "--world-size", "2").exit_code == 2
    assert cpe("publish", tmp_path / "absent", "--model", "m", "--version", "7").exit_code == 2
    assert cpe(*words[:-1], "-1").exit_code == 2
    assert publisher.made == []


# --- status --------------------------------------------------------------------------------------


def test_status_in_json_is_what_the_daemon_said(no_leaks: None, runtime_dir: Path) -> None:
    with listening(f"ipc://{runtime_dir}/front.sock", lambda: StatusReply(STATUS)):
        result = cpe("status", "--json", "--runtime-dir", runtime_dir)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == STATUS
    assert result.stderr == ""


def test_status_for_people_has_every_part(runtime_dir: Path) -> None:
    with listening(f"ipc://{runtime_dir}/front.sock", lambda: StatusReply(STATUS)):
        result = cpe("status", CPE_RUNTIME_DIR=str(runtime_dir))
    assert result.exit_code == 0, result.output
    for text in (
        "gpu-17, up 1 d 2 h",
        "cpe-daemon 9.9.9",
        "3.00 GiB free of 4.00 GiB (largest run 1.00 GiB), not all of it touched yet",
        "3 × 256.00 MiB",
        "qwen3@r1#7",
        "1.40 GiB",
        "2 of 2",
        "quarantined",
        "1 of 2",
        "152 ms",
        "rank 1 is gone",
        "Trainers: none",
    ):
        assert text in result.stdout
    assert "cpe_failures_total" not in result.stdout
    assert "\x1b" not in result.stdout


def test_status_shows_what_was_counted_where_that_is_asked_for(runtime_dir: Path) -> None:
    with listening(f"ipc://{runtime_dir}/front.sock", lambda: StatusReply(STATUS)):
        result = cpe("status", "--counters", CPE_RUNTIME_DIR=str(runtime_dir))
    assert 'cpe_failures_total{code="digest"}' in result.stdout
    assert "cpe_trainers" not in result.stdout, "it is 0"


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"daemon": None, "versions": {"a": 1}, "engines": ["x"], "counters": None},
        {"versions": [{}], "engines": [{}]},
    ],
)
def test_status_of_another_release_is_still_shown(status: dict[str, Any], runtime_dir: Path) -> None:
    with listening(f"ipc://{runtime_dir}/front.sock", lambda: StatusReply(status)):
        result = cpe("status", "--runtime-dir", runtime_dir)
    assert result.exit_code == 0, result.output


def test_status_over_tcp(runtime_dir: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    with listening(f"tcp://127.0.0.1:{port}", lambda: StatusReply(STATUS)):
        result = cpe("status", "--json", "--to", f"tcp://127.0.0.1:{port}")
    assert json.loads(result.stdout) == STATUS


def test_status_where_no_daemon_is_fails_at_once(runtime_dir: Path) -> None:
    result = cpe("status", "--runtime-dir", runtime_dir, "--timeout", "60")
    assert (result.exit_code, result.stdout) == (4, "")
    assert f"no daemon listens at ipc://{runtime_dir}/front.sock" in result.stderr
    assert result.stderr.endswith("[peer_lost]\n")


def test_status_of_a_stale_socket_names_the_endpoint(no_leaks: None, runtime_dir: Path) -> None:
    (runtime_dir / "front.sock").touch()
    result = cpe("status", "--runtime-dir", runtime_dir, "--timeout", "0.2")
    assert result.exit_code == 4
    assert f"ipc://{runtime_dir}/front.sock" in result.stderr


def test_status_of_a_silent_daemon_is_a_deadline(no_leaks: None, runtime_dir: Path) -> None:
    with listening(f"ipc://{runtime_dir}/front.sock", lambda: None):
        result = cpe("status", "--runtime-dir", runtime_dir, "--timeout", "2")
    assert result.exit_code == 5
    assert result.stderr.endswith("did not send its status within 2 s  [deadline]\n")


def test_status_refused_keeps_the_daemons_code(runtime_dir: Path) -> None:
    def refuse() -> Message:
        raise BusyError("starting")

    with listening(f"ipc://{runtime_dir}/front.sock", refuse):
        result = cpe("status", "--runtime-dir", runtime_dir)
    assert (result.exit_code, result.stderr) == (6, "error: starting  [busy]\n")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 << 40, "5.00 TiB"), (None, "-")]
)
def test_size_for_people(nbytes: int | None, text: str) -> None:
    assert bytes_text(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0152, "15 ms"),
        (3.21, "3.2 s"),
        (310, "5 m 10 s"),
        (7260, "2 h 1 m"),
        (90_000, "1 d 1 h"),
        (None, "-"),
    ],
)
def test_duration_for_people(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text

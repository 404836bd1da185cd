"""`cpe doctor`: the checks of what runs, how checks are run and shown, and how a live host is looked at."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from cpe_daemon import doctor
from cpe_daemon.cli import main
from cpe_daemon.cli.doctor import doctor_command
from cpe_daemon.config import Config
from cpe_daemon.doctor import CHECKS, Answer, Check, EngineUrl, Finding, LiveHost, Needs, Subject, Verdict, examine
from cpe_daemon.doctor.finding import Judgement, ok
from cpe_daemon.doctor.host import PYTHON, Entry, Ran
from cpe_daemon.doctor.subject import cores, cores_text
from tests.unit.doctor_hosts import (
    NEEDS,
    RUNTIME,
    RecordedHost,
    container,
    engine,
    examined,
    h200,
    is_,
    laptop,
    status,
    with_daemon,
)


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


# --- what runs -------------------------------------------------------------------------------------------------------


SERVED = with_daemon(laptop())
SHUT = SERVED.but(entries={f"{RUNTIME}/front.sock": Entry("socket", mode=0o660, writable=False)})
STALE = laptop().but(entries={f"{RUNTIME}/front.sock": Entry("socket")})
STARTING = SERVED.but(entries={f"{RUNTIME}/front.sock": None})


def test_daemon_that_answers_is_well() -> None:
    is_(examined("daemon", SERVED, status=status()), "ok", "answered in 3 ms", "pid 4242", "node gpu-17")


def test_daemon_that_takes_its_time_is_warned_of() -> None:
    is_(examined("daemon", SERVED, answer=Answer(status(), seconds=2.5)), "warn", "2500 ms", "slow")


def test_daemon_of_another_release_is_warned_of() -> None:
    older = status(daemon={"version": "0.0.1"})
    is_(examined("daemon", SERVED, status=older), "warn", "cpe-daemon 0.0.1 runs", "restart it")


def test_daemon_that_does_not_answer_has_failed() -> None:
    is_(examined("daemon", SERVED), "fail", "the daemon (pid 4242) does not answer: no answer", "journalctl")


def test_daemon_that_may_not_be_asked_has_failed_for_this_user() -> None:
    is_(examined("daemon", SHUT), "fail", "this user may not open /run/cpe/front.sock", "group")


def test_daemon_that_starts_is_waited_for() -> None:
    is_(examined("daemon", STARTING), "warn", "process 4242 is starting")


def test_daemon_that_is_not_there_is_skipped() -> None:
    is_(examined("daemon", laptop()), "skip", "no daemon runs in /run/cpe")
    is_(examined("daemon", STALE), "skip", "a killed one left its sockets")


def test_daemon_that_is_not_there_is_not_asked() -> None:
    def ask() -> Answer:
        raise AssertionError("there is nobody to ask")

    subject = Subject(laptop(), runtime_dir=RUNTIME, needs=NEEDS, ask=ask)
    assert examine(subject, only=["daemon"])[0].verdict is Verdict.SKIP


def test_daemon_is_asked_once_for_all_checks() -> None:
    asked: list[int] = []

    def ask() -> Answer:
        asked.append(1)
        return Answer(status())

    examine(Subject(SERVED, runtime_dir=RUNTIME, needs=NEEDS, ask=ask), seconds=30)
    assert asked == [1]


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        ({}, "ok", "1 attached, with all their ranks: e0"),
        ({"state": "updating", "ready": True}, "ok", "e0"),
        ({"state": "quarantined", "ready": False, "error": "rank 1 is gone"}, "fail", "quarantined"),
        ({"workers": [{"rank": 0, "present": True}, {"rank": 1, "present": False}]}, "fail", "lacks ranks 1 of 2"),
        ({"expected": True, "state": "unknown", "workers": []}, "fail", "cpe engine remove e0"),
        ({"expected": True, "workers": [{"rank": 0, "present": False}]}, "fail", "expected and not attached"),
        ({"state": "unknown", "ready": False}, "warn", "unknown and not ready"),
        ({"ready": False, "error": "no version yet"}, "warn", "(no version yet)"),
    ],
)
def test_engines_are_judged_by_the_daemon(facts: dict[str, Any], verdict: str, words: str) -> None:
    is_(examined("engines", SERVED, status=status(engines=[engine(**facts)])), verdict, words)


def test_engines_are_all_named() -> None:
    engines = [engine("a", state="quarantined"), engine("b", state="unknown", ready=False), engine("c")]
    finding = examined("engines", SERVED, status=status(engines=engines))
    is_(finding, "fail", "engine a is quarantined", "engine b is unknown")
    assert "engine c" not in finding.found


def test_engines_are_skipped_where_there_are_none() -> None:
    is_(examined("engines", laptop()), "skip", "see daemon")
    is_(examined("engines", SERVED, status=status()), "skip", "no engine is attached")
    is_(examined("engines", SERVED, status=status(engines="none of your business")), "skip", "no engine is attached")


GIVEN = [EngineUrl("a", "vllm", "http://127.0.0.1:8000/"), EngineUrl("b", "sglang", "http://127.0.0.1:30000")]
A, B = "http://127.0.0.1:8000/health", "http://127.0.0.1:30000/health"


def test_engine_urls_are_asked_for_their_health() -> None:
    is_(examined("engine-urls", laptop().but(urls={A: 200, B: 200}), engines=GIVEN), "ok", "healthy: a, b")


def test_engine_urls_that_are_not_well_are_warned_of() -> None:
    is_(examined("engine-urls", laptop().but(urls={A: 503, B: 200}), engines=GIVEN), "warn", "engine a (vllm)", "503")


def test_engine_urls_that_do_not_answer_have_failed() -> None:
    is_(examined("engine-urls", laptop().but(urls={A: 200}), engines=GIVEN), "fail", f"{B}: Connection refused")


def test_engine_urls_that_take_too_long_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(RecordedHost):
        def get(self, url: str, seconds: float) -> int | str:
            never.wait(30)
            return 200

    never = threading.Event()
    monkeypatch.setattr("cpe_daemon.doctor.serving._HEALTH_SECONDS", 0.05)
    is_(examined("engine-urls", Slow(), engines=GIVEN[:1]), "fail", "nothing within 0.05 s")
    never.set()


def test_engine_urls_are_those_that_the_daemon_was_told() -> None:
    host = SERVED.but(urls={A: 200})
    is_(examined("engine-urls", host, status=status(engines=[engine(url="http://127.0.0.1:8000")])), "ok", "e0")


@pytest.mark.parametrize(
    ("text", "verdict", "words"),
    [
        (
            '{"format": 1, "engines": [{"name": "x", "kind": "vllm", "url": "http://127.0.0.1:8000"}]}',
            "ok",
            "healthy: x",
        ),
        ('{"format": 1, "engines": [{"name": "x", "kind": "torch"}]}', "skip", "no engine's URL"),
        ('{"format": 1, "engi', "skip", "no engine's URL"),
        ("[]", "skip", "no engine's URL"),
    ],
)
def test_engine_urls_are_those_of_the_file_while_no_daemon_runs(text: str, verdict: str, words: str) -> None:
    needs = Needs(arena_bytes=1, engines_file="/var/lib/cpe-daemon/engines.json")
    host = laptop().but(urls={A: 200}, files={"/var/lib/cpe-daemon/engines.json": text})
    is_(examined("engine-urls", host, needs=needs), verdict, words)


# --- how checks are run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [laptop(), h200(), container(), with_daemon(h200()), RecordedHost()])
def test_every_check_has_something_to_say_of_every_host(host: RecordedHost) -> None:
    subject = Subject(host, runtime_dir=RUNTIME, needs=NEEDS, ask=lambda: Answer(status()))
    findings = examine(subject, seconds=30)
    assert [finding.name for finding in findings] == [check.name for check in CHECKS]
    for finding in findings:
        assert "the check itself failed" not in finding.found, finding
        assert finding.found
        assert finding.mend or finding.verdict in {Verdict.OK, Verdict.SKIP}, finding


def subject() -> Subject:
    return Subject(laptop(), runtime_dir=RUNTIME, needs=NEEDS, ask=lambda: Answer(None))


def test_a_check_that_hangs_does_not_keep_the_others() -> None:
    never = threading.Event()

    def hang(_subject: Subject) -> Judgement:
        never.wait(30)
        return ok("at last")

    checks = [Check("slow", "x", hang), Check("quick", "x", lambda _: ok("fine"))]
    slow, quick = examine(subject(), checks=checks, seconds=2.0)
    never.set()
    assert (quick.verdict, slow.verdict) == (Verdict.OK, Verdict.FAIL)
    assert "within 2 s" in slow.found


def test_a_check_that_breaks_does_not_keep_the_others() -> None:
    def stumble(_subject: Subject) -> Judgement:
        raise KeyError("MemAvailable")

    broken, well = examine(subject(), checks=[Check("b", "x", stumble), Check("w", "x", lambda _: ok("fine"))])
    is_(broken, "warn", "KeyError: 'MemAvailable'", "bug in cpe")
    assert well.verdict is Verdict.OK


def test_progress_says_what_is_waited_for() -> None:
    first_done = threading.Event()
    told: list[list[str]] = []

    def second(_subject: Subject) -> Judgement:
        assert first_done.wait(30)
        return ok("fine")

    def waiting(names: list[str]) -> None:
        told.append(names)
        first_done.set()

    examine(subject(), checks=[Check("a", "x", lambda _: ok("fine")), Check("b", "x", second)], waiting=waiting)
    assert told == [["b"], []]


def test_needs_are_those_of_the_settings() -> None:
    needs = Needs.of(
        Config.model_validate({"arena": {"size_bytes": "8GiB"}, "ingest": {"listen": "tcp://10.0.0.7:5555"}})
    )
    assert (needs.arena_bytes, needs.slot_bytes, needs.ring_bytes) == (8 << 30, 768 << 20, 128 << 20)
    assert needs.endpoints == ("tcp://10.0.0.7:5555", "http://127.0.0.1:9845")
    assert needs.engines_file.endswith("/engines.json")
    assert (needs.wants_gpu, needs.wants_curve) == (False, True)
    quiet = Needs.of(Config.model_validate({"http": {"listen": ""}, "ingest": {"insecure": True}}))
    assert (quiet.endpoints, quiet.wants_curve) == ((), False)


@pytest.mark.parametrize("text", ["", "0", "0-7", "0-55,112-167", "0,2,4-5"])
def test_lists_of_cores_are_read_and_written(text: str) -> None:
    assert cores_text(cores(f"{text}\n")) == text


# --- a live host -----------------------------------------------------------------------------------------------------


def test_live_host_reads_what_there_is(tmp_path: Path) -> None:
    host = LiveHost()
    (tmp_path / "file").write_bytes(b"text \xff")
    (tmp_path / "link").symlink_to("file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    assert host.read(f"{tmp_path}/file") == "text \N{REPLACEMENT CHARACTER}"
    assert host.read("/proc/sys/kernel/osrelease") == os.uname().release + "\n"
    assert (host.read(f"{tmp_path}/none"), host.read("nul\0"), host.read(str(tmp_path))) == (None, None, None)
    assert host.names(str(tmp_path)) == ["file", "link", "socket"]
    assert (host.names(f"{tmp_path}/none"), host.names("nul\0")) == (None, None)
    kinds = {
        name: found.kind for name in ["file", "link", "socket", "."] if (found := host.entry(f"{tmp_path}/{name}"))
    }
    assert kinds == {"file": "file", "link": "link", "socket": "socket", ".": "directory"}
    assert (host.entry(f"{tmp_path}/none"), host.entry("nul\0")) == (None, None)
    assert (host.uid, host.environ) == (os.geteuid(), os.environ)


def test_live_host_runs_a_command_once(tmp_path: Path) -> None:
    host, counter = LiveHost(), tmp_path / "counter"
    command = ("sh", "-c", f"echo x >> {counter}; echo out; echo err >&2; exit 3")
    found = [host.run(command, 30) for _ in range(2)]
    assert found == [Ran(3, "out\n", "err\n")] * 2
    assert counter.read_text() == "x\n"
    assert host.run(("no-such-program-here",), 30) is None


def test_live_host_ends_a_command_that_takes_too_long_and_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    wait = subprocess.Popen.communicate
    heard: list[bytes] = []

    def communicate(process: subprocess.Popen[str], *, timeout: float) -> tuple[str, str]:
        """Instead of waiting for a time, wait until what the command started says that it runs."""
        if not heard:
            reader = os.open(fifo, os.O_RDONLY)
            heard.append(os.read(reader, 1))
            monkeypatch.setattr(os, "killpg", kill_then_hear(os.killpg, reader))
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout=timeout)

    def kill_then_hear(kill: Callable[[int, int], None], reader: int) -> Callable[[int, int], None]:
        def both(group: int, number: int) -> None:
            kill(group, number)
            heard.append(os.read(reader, 1))  # nothing, once nobody is left who could write
            os.close(reader)

        return both

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    assert LiveHost().run(("sh", "-c", f"(echo -n x; exec sleep 60) > {fifo} & wait"), 30) == Ran(None)
    assert heard == [b"x", b""]


def test_live_host_runs_the_interpreter_of_the_daemon() -> None:
    ran = LiveHost().run((PYTHON, "-P", "-c", "import sys; print(sys.executable)"), 30)
    assert ran is not None
    assert (ran.status, ran.out.strip()) == (0, sys.executable)


def test_what_a_command_said_is_its_last_word() -> None:
    assert Ran(1, "out\n", "first\nlast\n\n").said == "last"
    assert Ran(1, "out\n", "").said == "out"
    assert Ran(-signal.SIGSEGV).said == "status -11"


def test_live_host_knows_a_port_that_is_taken() -> None:
    host = LiveHost()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert host.refuses("127.0.0.1", port) == "EADDRINUSE"
        assert host.refuses("0.0.0.0", port) == "EADDRINUSE"
    assert host.refuses("127.0.0.1", port) is None
    assert host.refuses("192.0.2.1", port) == "EADDRNOTAVAIL"


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """An engine's server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join(10)


def test_live_host_gets_urls(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:3128")  # an engine of this node is not asked through it
    host = LiveHost()
    assert (host.get(f"{server}/health", 10), host.get(f"{server}/other", 10)) == (200, 503)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        assert "refused" in str(host.get(f"http://127.0.0.1:{unheard.getsockname()[1]}/health", 10))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "timed out" in str(host.get(f"http://127.0.0.1:{mute.getsockname()[1]}/health", 0.05))
    assert "neither an http nor a unix URL" in str(host.get("file:///etc/passwd", 1))
    assert isinstance(host.get("http://[half", 1), str)


class SocketServer(ThreadingMixIn, UnixStreamServer):
    """An engine's server on a Unix socket."""

    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, Any]:
        connected, _ = super().get_request()
        return connected, ("", 0)


def test_live_host_gets_urls_of_unix_sockets(runtime_dir: Path) -> None:
    host, path = LiveHost(), runtime_dir / "v.sock"
    with SocketServer(str(path), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert (host.get(f"unix://{path}/health", 10), host.get(f"unix://{path}/other", 10)) == (200, 503)
        listening.shutdown()
        thread.join(10)
    assert "refused" in str(host.get(f"unix://{path}/health", 10))
    assert "No such file" in str(host.get(f"unix://{runtime_dir}/none.sock/health", 10))
    assert "too long" in str(host.get(f"unix:///{'long' * 40}/health", 10))
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(runtime_dir / "mute.sock"))
        mute.listen()
        assert "timed out" in str(host.get(f"unix://{runtime_dir}/mute.sock/health", 0.05))


# --- the command -----------------------------------------------------------------------------------------------------


def cpe(*arguments: str | Path, **environ: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *(str(argument) for argument in arguments)], env=environ)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the examination finds; a test fills it."""
    findings: list[Finding] = []

    def fake(_subject: Subject, **_terms: object) -> Sequence[Finding]:
        return findings

    monkeypatch.setattr(doctor, "examine", fake)
    return findings


WELL = Finding("kernel", "host", Verdict.OK, "Linux")
SLOW = Finding("pcie", "gpus", Verdict.WARN, "GPU 3 runs on 8 of its 16 lanes", "reseat the card")
BROKEN = Finding("engines", "serving", Verdict.FAIL, "engine e\x1b[2J is quarantined", "publish")
ABSENT = Finding("rdma", "network", Verdict.SKIP, "no RDMA device")


@pytest.mark.parametrize(
    ("findings", "status", "strict"),
    [([], 0, 0), ([WELL, ABSENT], 0, 0), ([WELL, SLOW], 0, 1), ([WELL, SLOW, BROKEN], 1, 1)],
)
def test_exit_status_says_whether_something_failed(
    findings: list[Finding], status: int, strict: int, found: list[Finding], runtime_dir: Path
) -> None:
    found += findings
    assert cpe("--runtime-dir", runtime_dir).exit_code == status
    assert cpe("--runtime-dir", runtime_dir, "--strict").exit_code == strict


def test_findings_are_shown_by_group_with_their_mend(found: list[Finding], runtime_dir: Path) -> None:
    found += [WELL, SLOW, BROKEN, ABSENT]
    shown = cpe("--runtime-dir", runtime_dir).stdout
    assert shown.splitlines() == [
        "host",
        "  ok    kernel          Linux",
        "gpus",
        "  warn  pcie            GPU 3 runs on 8 of its 16 lanes",
        "                        mend: reseat the card",
        "serving",
        "  fail  engines         engine e\N{REPLACEMENT CHARACTER}[2J is quarantined",
        "                        mend: publish",
        "network",
        "  skip  rdma            no RDMA device",
        "1 ok, 1 warn, 1 fail, 1 skip",
    ]


def test_findings_as_json_have_the_documented_keys(found: list[Finding], runtime_dir: Path) -> None:
    found += [SLOW]
    listed = json.loads(cpe("--runtime-dir", runtime_dir, "--json").stdout)
    assert listed == [
        {
            "name": "pcie",
            "group": "gpus",
            "verdict": "warn",
            "found": "GPU 3 runs on 8 of its 16 lanes",
            "mend": "reseat the card",
        }
    ]
    keys = (doctor_command.help or "").partition("Keys of each")[2].partition("Exit status")[0]
    assert re.findall(r"^ +(\w+)  ", keys, re.MULTILINE) == list(listed[0])


def test_help_names_every_check_in_its_group() -> None:
    listed = (doctor_command.help or "").partition("for --only:")[2].partition("Examples")[0]
    groups = dict(re.findall(r"^ +(\w+) +(.+)$", listed, re.MULTILINE))
    assert [(name, group) for group, names in groups.items() for name in names.split(", ")] == [
        (check.name, check.group) for check in CHECKS
    ]


def test_only_runs_what_is_named(runtime_dir: Path) -> None:
    ran = cpe("--runtime-dir", runtime_dir, "--only", "kernel", "--only", "runtime-dir", "--json")
    assert [finding["name"] for finding in json.loads(ran.stdout)] == ["runtime-dir", "kernel"]


def test_only_names_the_checks_that_there_are() -> None:
    refused = cpe("--only", "kernal")
    assert refused.exit_code == 2
    assert "there is no check 'kernal'" in refused.stderr
    assert "runtime-dir" in refused.stderr


def test_only_is_completed() -> None:
    completed = ShellComplete(main, {}, "cpe", "_CPE_COMPLETE").get_completions(["doctor", "--only"], "comp")
    assert [item.value for item in completed] == ["compute-mode"]


def test_settings_that_are_not_valid_are_a_finding(tmp_path: Path, runtime_dir: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text("device:\n  slots: -1\n")
    ran = cpe("--config", path, "--runtime-dir", runtime_dir, "--only", "config", "--only", "memory", "--json")
    config, memory = json.loads(ran.stdout)
    assert (ran.exit_code, config["verdict"], memory["verdict"]) == (1, "fail", "skip")
    assert f"{path}:2: device.slots" in config["found"]


def test_settings_are_what_is_judged(tmp_path: Path, runtime_dir: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text("arena:\n  size_bytes: 60TiB\n")
    ran = cpe("--runtime-dir", runtime_dir, "--only", "memory", "--only", "config", "--json", CPE_CONFIG=str(path))
    config, memory = json.loads(ran.stdout)
    assert (config["verdict"], config["found"]) == ("ok", f"{path} is valid")
    assert memory["verdict"] == "fail"
    assert "61440.0 GiB" in memory["found"]


@pytest.mark.parametrize("text", ["127.0.0.1:8000", "a=ftp://127.0.0.1", "a="])
def test_engine_that_is_no_url_is_refused(text: str) -> None:
    refused = cpe("--engine", text)
    assert refused.exit_code == 2
    assert "http://HOST:PORT" in refused.stderr


def test_engines_given_are_asked(server: str, runtime_dir: Path) -> None:
    terms = ("--runtime-dir", runtime_dir, "--only", "engine-urls", "--json")
    (finding,) = json.loads(cpe("--engine", f"mine={server}", "--engine", f"{server}/", *terms).stdout)
    assert (finding["verdict"], finding["found"]) == ("ok", f"healthy: mine, {server.removeprefix('http://')}")

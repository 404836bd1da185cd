"""What the init system is told, over a real notify socket; and that nothing about it ever matters to the daemon."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cpe_daemon.observe.notify import Notifier


class InitSystem:
    """The other end of ``NOTIFY_SOCKET``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.setblocking(False)

    def hear(self) -> list[str]:
        """The messages that wait, as they are."""
        heard = []
        while True:
            try:
                heard.append(self._socket.recv(65536).decode())
            except BlockingIOError:
                return heard

    def fill(self, notifier: Notifier) -> int:
        """Have its queue filled, up to a message that finds no room; return how many found some."""
        for count in range(100_000):
            before = notifier._unsent
            notifier.status(f"line {count}")
            if notifier._unsent != before:
                return count
        pytest.fail("its queue is endless")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def system(no_leaks: None, runtime_dir: Path, request: pytest.FixtureRequest) -> Iterator[InitSystem]:
    name = str(runtime_dir / "notify") if request.param == "path" else f"@cpe-test-{os.getpid()}"
    started = InitSystem(name)
    yield started
    started.close()


@pytest.fixture
def notifier(system: InitSystem) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": system.name, "WATCHDOG_USEC": "30000000"})
    yield made
    made.close()


def test_life_of_a_service(system: InitSystem, notifier: Notifier) -> None:
    assert notifier.connected
    notifier.extend_timeout(60)
    notifier.status("starting: 43%")
    notifier.ready("serving 2 engines")
    notifier.feed_watchdog()
    notifier.beginning_anew("beginning anew")
    notifier.stopping("draining")
    *said, last_but_one, last = system.hear()
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+\nSTATUS=beginning anew", last_but_one)
    assert [*said, last] == [
        "EXTEND_TIMEOUT_USEC=60000000",
        "STATUS=starting: 43%",
        "READY=1\nSTATUS=serving 2 engines",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=draining",
    ]


def test_status_is_said_when_it_is_another(system: InitSystem, notifier: Notifier) -> None:
    notifier.ready("one")
    notifier.status("one")
    notifier.status("two")
    notifier.status("two")
    notifier.status("one")
    assert system.hear() == ["READY=1\nSTATUS=one", "STATUS=two", "STATUS=one"]


def test_status_cannot_say_anything_but_a_status(system: InitSystem, notifier: Notifier) -> None:
    notifier.status("a model's\nMAINPID=1\r\nname")
    assert system.hear() == ["STATUS=a model's MAINPID=1 name"]


def test_odd_characters_are_no_trouble(system: InitSystem, notifier: Notifier) -> None:
    notifier.status("engine \udcff is in doubt")
    assert system.hear() == ["STATUS=engine ? is in doubt"]


def test_what_finds_the_queue_full_goes_with_the_next_and_the_latest_counts(
    system: InitSystem, notifier: Notifier
) -> None:
    system.fill(notifier)
    notifier.ready("serving")  # neither raises nor waits
    notifier.feed_watchdog()
    notifier.extend_timeout(5)
    notifier.status("serving 1 engine")
    system.hear()
    notifier.feed_watchdog()
    assert [set(message.split("\n")) for message in system.hear()] == [
        {"READY=1", "STATUS=serving 1 engine", "WATCHDOG=1"}
    ]
    notifier.feed_watchdog()
    assert system.hear() == ["WATCHDOG=1"]


def test_init_system_that_is_gone_is_complained_of_once(system: InitSystem, notifier: Notifier) -> None:
    system.close()
    with structlog.testing.capture_logs() as logs:
        notifier.ready("serving")
        notifier.status("still serving")
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("notify.failed", "warning")]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "1000000"}])
def test_without_an_init_system_nothing_is_said(no_leaks: None, environ: dict[str, str]) -> None:
    with structlog.testing.capture_logs() as logs:
        notifier = Notifier(environ)
        notifier.ready("serving")
        notifier.feed_watchdog()
        notifier.close()
    assert not notifier.connected
    assert notifier.watchdog_seconds == 0.0
    assert logs == []


@pytest.mark.parametrize("address", ["vsock:2:1234", "notify", "/" + "x" * 200])
def test_address_that_cannot_be_used_is_said_and_nothing_more(no_leaks: None, address: str) -> None:
    with structlog.testing.capture_logs() as logs:
        notifier = Notifier({"NOTIFY_SOCKET": address})
        notifier.ready("serving")
        notifier.status("well")
        notifier.close()
    assert len(logs) == 1


def test_watchdog_that_is_not_there_is_not_fed(system: InitSystem) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": system.name})
    notifier.feed_watchdog()
    assert system.hear() == []
    notifier.close()


def test_nothing_is_said_once_it_is_closed(system: InitSystem, notifier: Notifier) -> None:
    notifier.close()
    notifier.ready("serving")
    assert system.hear() == []


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", str(os.getpid()), 30.0),
        ("30000000", "1", 0.0),  # somebody else's, which this process has inherited
        ("0", None, 0.0),
        ("-5", None, 0.0),
        ("soon", None, 0.0),
        ("30000000", "me", 0.0),
    ],
)
def test_watchdog_is_fed_if_it_watches_this_process(
    system: InitSystem, usec: str, pid: str | None, seconds: float
) -> None:
    environ = {"NOTIFY_SOCKET": system.name, "WATCHDOG_USEC": usec} | ({"WATCHDOG_PID": pid} if pid else {})
    with structlog.testing.capture_logs():
        notifier = Notifier(environ)
    assert notifier.watchdog_seconds == seconds
    notifier.close()


def test_environment_of_the_process_is_what_counts(system: InitSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", system.name)
    monkeypatch.setenv("WATCHDOG_USEC", "500000")
    notifier = Notifier()
    notifier.ready("here")
    assert notifier.watchdog_seconds == 0.5
    assert system.hear() == ["READY=1\nSTATUS=here"]
    notifier.close()

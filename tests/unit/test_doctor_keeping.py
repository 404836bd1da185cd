"""`cpe doctor` on what the daemon keeps on disk, and on what it may not look at."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from cpe_daemon.doctor import LiveHost, Needs
from cpe_daemon.doctor.host import Entry, Ran
from cpe_daemon.doctor.systemd import _COMMAND as SHOW
from tests.unit.doctor_hosts import (
    GIB,
    NEEDS,
    RUNTIME,
    RecordedHost,
    examined,
    is_,
    laptop,
    service,
    status,
    with_daemon,
)

STATE, KEYS = "/var/lib/cpe-daemon", "/etc/cpe-daemon/keys"
KEEPING = dataclasses.replace(NEEDS, state_dir=STATE, engines_file=f"{STATE}/engines.json", keys_dir=KEYS)
TCP = dataclasses.replace(KEEPING, wants_curve=True)
SECRET, ALLOWED = f"{KEYS}/daemon.key_secret", f"{KEYS}/allowed"


def kept() -> RecordedHost:
    """A host of this user's, on which the daemon has what it needs."""
    return laptop().but(
        entries={
            STATE: Entry("directory", uid=1000, mode=0o750),
            f"{STATE}/engines.json": Entry("file", uid=1000, mode=0o640),
            KEYS: Entry("directory", uid=1000, mode=0o750),
            SECRET: Entry("file", uid=1000, mode=0o600),
            ALLOWED: Entry("file", uid=1000, mode=0o640),
        },
        files={f"{STATE}/engines.json": '{"format": 1}', SECRET: "curve", ALLOWED: "# who\ntrainer KEY run-7\n"},
    )


def with_unit(host: RecordedHost, **changes: str) -> RecordedHost:
    return host.but(
        entries={"/run/systemd/system": Entry("directory")}, commands={SHOW: Ran(0, service(User="cpe", **changes))}
    )


def test_all_is_well() -> None:
    is_(examined("state-dir", kept(), needs=KEEPING), "ok", STATE)
    is_(examined("keys", kept(), needs=TCP), "ok", "1 client is allowed")
    is_(examined("keys", kept(), needs=KEEPING), "skip", "no tcp endpoint takes keys")
    for name in ("state-dir", "keys"):
        is_(examined(name, kept(), needs=None), "skip", "the settings are not valid")


@pytest.mark.parametrize(
    ("entries", "files", "verdict", "words"),
    [
        ({STATE: Entry("file")}, {}, "fail", "is a file"),
        ({STATE: Entry("directory", uid=990, writable=False)}, {}, "fail", "may not write to /var/lib/cpe-daemon"),
        ({STATE: Entry("directory", uid=990, searchable=False)}, {}, "fail", "run the daemon as cpe"),
        ({}, {f"{STATE}/engines.json": None}, "fail", f"may not read {STATE}/engines.json"),
        (
            {f"{STATE}/journal.json": Entry("file", uid=0)},
            {},
            "fail",
            f"may not read {STATE}/journal.json, which is root",
        ),
        ({}, {f"{STATE}/engines.json": "{"}, "fail", "is damaged"),
        ({STATE: None, "/var": Entry("directory", writable=False)}, {}, "fail", "may not make it in /var"),
        ({STATE: None, "/var/lib": Entry("directory")}, {}, "ok", "is not there yet"),
    ],
)
def test_state_that_a_daemon_could_not_keep_is_found(
    entries: dict[str, Entry | None], files: dict[str, str | None], verdict: str, words: str
) -> None:
    is_(examined("state-dir", kept().but(entries=entries, files=files), needs=KEEPING), verdict, words)


@pytest.mark.parametrize(
    ("entries", "files", "verdict", "words"),
    [
        ({SECRET: None}, {SECRET: None}, "fail", f"cpe keys new --daemon --dir {KEYS}"),
        ({KEYS: None, SECRET: None}, {SECRET: None}, "fail", "is not there"),
        ({SECRET: Entry("file", uid=1000, mode=0o640)}, {}, "fail", "mode 0640"),
        ({SECRET: Entry("file", uid=0, mode=0o600)}, {SECRET: None}, "fail", "which is root's"),
        ({KEYS: Entry("directory", uid=0, mode=0o700, searchable=False)}, {}, "fail", f"may not enter {KEYS}"),
        ({ALLOWED: Entry("file", uid=1000, mode=0o666)}, {}, "fail", "mode 0666"),
        ({}, {ALLOWED: "# nobody\n"}, "warn", "no client is allowed"),
        ({ALLOWED: None}, {ALLOWED: None}, "warn", "no client is allowed"),
        ({ALLOWED: Entry("link", mode=0o777)}, {}, "ok", "allowed"),
    ],
)
def test_keys_that_the_daemon_would_refuse_are_found(
    entries: dict[str, Entry | None], files: dict[str, str | None], verdict: str, words: str
) -> None:
    is_(examined("keys", kept().but(entries=entries, files=files), needs=TCP), verdict, words)


def test_files_of_the_service_are_no_matter_of_another_users() -> None:
    theirs = {STATE: Entry("directory", uid=990, writable=False), SECRET: Entry("file", uid=990, mode=0o600)}
    host = with_unit(kept().but(entries=theirs, files={SECRET: None}))
    is_(examined("state-dir", host, needs=TCP), "skip", "run this as the daemon's user")
    is_(examined("keys", host, needs=TCP), "skip", "run this as the daemon's user")
    answering = with_daemon(kept().but(entries=theirs, files={SECRET: None}))
    is_(examined("keys", answering, needs=TCP, status=status()), "skip", "run this as the daemon's user")


def test_pair_that_root_made_and_the_service_cannot_read_is_found() -> None:
    host = with_unit(kept().but(entries={SECRET: Entry("file", uid=0, mode=0o600)}, uid=0))
    is_(examined("keys", host, needs=TCP), "fail", "cpe could not read it", f"chown -R cpe: {KEYS}")
    is_(examined("keys", host.but(entries={SECRET: Entry("file", uid=990, mode=0o600)}), needs=TCP), "ok")


def test_state_directory_of_the_unit_is_made_by_systemd() -> None:
    host = with_unit(kept().but(entries={STATE: None}), StateDirectory="cpe-daemon")
    is_(examined("state-dir", host, needs=KEEPING), "ok", "StateDirectory=")


def test_user_who_may_not_enter_the_runtime_directory_is_told_so() -> None:
    host = laptop().but(entries={RUNTIME: Entry("directory", uid=990, mode=0o750, searchable=False)})
    is_(examined("daemon", host), "fail", f"may not enter {RUNTIME}", "usermod -aG GROUP USER")
    is_(examined("runtime-dir", host), "skip", f"{RUNTIME} is cpe's", "see daemon")
    is_(examined("memory", host), "skip", "see daemon")


@pytest.mark.parametrize(
    ("wanted", "verdict", "words"),
    [
        (4 * GIB, "ok", ("the daemon has its arena of 4.0 GiB",)),
        (2 * GIB, "ok", ("the daemon has its arena of 4.0 GiB",)),
        (16 * GIB, "ok", ("leaves 24.0 GiB", "the arena of 4.0 GiB that the daemon which runs would give back")),
        (60 * GIB, "fail", ("the arena of 60.0 GiB", "leaves 24.0 GiB", "lower arena.size_bytes")),
    ],
)
def test_memory_that_is_wanted_is_compared_with_what_the_daemon_has(
    wanted: int, verdict: str, words: tuple[str, ...]
) -> None:
    needs = Needs(arena_bytes=wanted)
    is_(examined("memory", with_daemon(laptop()), needs=needs, status=status()), verdict, *words)


def test_host_says_which_directories_this_user_may_enter(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o600)
    entry = LiveHost().entry(str(tmp_path / "shut"))
    assert entry is not None
    assert entry.searchable == (os.geteuid() == 0)

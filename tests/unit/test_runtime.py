"""The runtime directory: whose it has to be, who has it, and what is removed from it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.runtime import RuntimeDirectory

SOCKETS = ("engines.sock", "front.sock", "handoff.sock")


def entered(path: Path) -> None:
    with RuntimeDirectory(path):
        pass


def test_directory_is_made_for_its_user_and_group(runtime_dir: Path) -> None:
    path = runtime_dir / "made"
    with RuntimeDirectory(path):
        assert path.stat().st_mode & 0o027 == 0
        assert (path / "daemon.lock").read_text() == f"{os.getpid()}\n"
    entered(path)  # it is free again


def test_directory_that_everybody_may_write_to_is_refused(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o777)
    with pytest.raises(ConfigError, match=r"is not this user's alone: everybody may write to it \(mode 0777\)"):
        entered(runtime_dir)
    assert list(runtime_dir.iterdir()) == []


def test_directory_of_another_user_is_refused_and_both_are_named(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = runtime_dir.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"belongs to uid {owner}, and this daemon runs as uid {owner + 1}; mend"):
        entered(runtime_dir)
    assert list(runtime_dir.iterdir()) == []


def test_link_to_a_directory_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "real").mkdir(0o750)
    (runtime_dir / "link").symlink_to("real")
    with pytest.raises(ConfigError, match="it is a link, or no directory"):
        entered(runtime_dir / "link")
    assert list((runtime_dir / "real").iterdir()) == []


def test_second_owner_is_refused_and_the_first_keeps_its_sockets(runtime_dir: Path) -> None:
    with RuntimeDirectory(runtime_dir):
        for name in SOCKETS:
            (runtime_dir / name).touch()
        with pytest.raises(ResourceError, match=rf"another daemon \(pid {os.getpid()}\) runs on {runtime_dir}"):
            entered(runtime_dir)
        assert sorted(path.name for path in runtime_dir.iterdir()) == sorted((*SOCKETS, "daemon.lock"))
        assert (runtime_dir / "daemon.lock").read_text() == f"{os.getpid()}\n"


def test_sockets_of_a_killed_daemon_are_removed_and_nothing_else(runtime_dir: Path) -> None:
    for name in SOCKETS:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(runtime_dir / name))
    (runtime_dir / "notes").touch()
    with RuntimeDirectory(runtime_dir):
        assert sorted(path.name for path in runtime_dir.iterdir()) == ["daemon.lock", "notes"]

"""A user who is not let in to the daemon's sockets is told so at once, and how that is changed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich.progress  # noqa: F401 - as the next: the interpreter's own files may be out of an outsider's reach
import torch
from click.testing import CliRunner

import cpe_daemon.config  # noqa: F401
from cpe_daemon.cli import main
from cpe_daemon.errors import AccessError
from cpe_daemon.links import permission
from cpe_daemon.links.permission import check_permission
from cpe_daemon.publisher import Publisher
from inference_plugins.torch import attach

NOBODY = 65534


@pytest.fixture
def directory() -> Iterator[Path]:
    """A daemon's runtime directory with its sockets; everybody may come near it."""
    above = Path(tempfile.mkdtemp(prefix="cpe-permission-", dir="/tmp"))
    above.chmod(0o755)
    inside = above / "cpe"
    inside.mkdir()
    for name in ("front.sock", "engines.sock"):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(inside / name))
    yield inside
    inside.chmod(0o700)
    shutil.rmtree(above)


@pytest.fixture
def outsider(directory: Path) -> Iterator[str]:
    """Be a user whom neither the directory's owner nor its group is: its mode lets the group alone in."""
    directory.chmod(0o050)  # even where this user owns it
    if os.geteuid() != 0:
        yield pwd.getpwuid(os.geteuid()).pw_name
        return
    os.chown(directory, 0, 0)
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield pwd.getpwuid(NOBODY).pw_name
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def test_outsider_is_told_which_group_is_let_in(directory: Path, outsider: str) -> None:
    with pytest.raises(AccessError, match=f"you may not enter {directory}, .*`usermod -aG .* {outsider}` as root"):
        check_permission(f"ipc://{directory}/front.sock")


def test_directory_of_one_user_names_that_user(directory: Path, outsider: str) -> None:
    if os.geteuid() != NOBODY:
        pytest.skip("takes a second user")
    os.seteuid(0)
    directory.chmod(0o700)
    os.seteuid(NOBODY)
    with pytest.raises(AccessError, match=r"which is root's alone \(mode 0700\); run this as root"):
        check_permission(f"ipc://{directory}/front.sock")


def test_socket_that_may_not_be_opened_is_named(directory: Path, outsider: str) -> None:
    if os.geteuid() != NOBODY:
        pytest.skip("takes a second user")
    os.seteuid(0)
    directory.chmod(0o755)
    (directory / "front.sock").chmod(0o660)
    os.seteuid(NOBODY)
    with pytest.raises(AccessError, match=f"you may not open {directory}/front.sock"):
        check_permission(f"ipc://{directory}/front.sock")


def test_what_is_open_or_not_there_yet_is_no_matter_of_permission(directory: Path) -> None:
    check_permission(f"ipc://{directory}/front.sock")
    check_permission(f"ipc://{directory}/none.sock")
    check_permission(f"ipc://{directory}/none/front.sock")
    check_permission("tcp://10.0.0.7:5555")


def test_socket_that_a_daemon_takes_away_meanwhile_is_not_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_away(path: Path, mode: int) -> bool:
        if path.is_dir():
            return True
        path.unlink()
        return False

    monkeypatch.setattr(permission, "_may", take_away)
    check_permission(f"ipc://{directory}/front.sock")
    assert not (directory / "front.sock").exists()


def test_commands_say_so_at_once(directory: Path, outsider: str) -> None:
    began = time.monotonic()
    for command in (
        ["status", "--runtime-dir", str(directory)],
        ["status", "--to", f"ipc://{directory}/front.sock"],
        ["push", "m", "--runtime-dir", str(directory)],
        ["publish", "/", "--model", "m", "--version", "1", "--to", str(directory)],
        ["publish", "/", "--model", "m", "--version", "1", "--runtime-dir", str(directory)],
    ):
        ran = CliRunner().invoke(main, command)
        assert ran.exit_code == 3, ran.output
        assert f"you may not enter {directory}" in ran.stderr
        assert "[access]" in ran.stderr
    assert time.monotonic() - began < 10, "publish alone would wait so long for a daemon"


def test_trainer_is_told_at_once(directory: Path, outsider: str) -> None:
    with (
        Publisher(str(directory), model="m", run="r", connect_timeout=60) as publisher,
        pytest.raises(AccessError, match="you may not enter"),
    ):
        publisher.publish({"w": torch.zeros(4)}, version=1)


def test_engine_is_told_at_once(directory: Path, outsider: str) -> None:
    with pytest.raises(AccessError, match="you may not enter"):
        attach({"w": torch.zeros(4)}, engine="e", socket=str(directory), connect_timeout=60)

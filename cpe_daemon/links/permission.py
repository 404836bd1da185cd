"""Whether this user may connect to a daemon's unix socket: ZeroMQ tries for ever where the kernel says no."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import Final

from cpe_daemon.errors import AccessError

_IPC: Final = "ipc://"


def check_permission(endpoint: str) -> None:
    """Refuse a unix socket that this user may not reach. Whether anything is there makes no difference.

    Raises:
        AccessError: the user may not enter a directory on the way, or not write to the socket; says who may, and how
            to become one of them.
    """
    path = Path(endpoint.removeprefix(_IPC))
    if not endpoint.startswith(_IPC) or not path.is_absolute():
        return
    with contextlib.suppress(FileNotFoundError):  # a daemon that stops takes them away meanwhile
        for directory in reversed(path.parents):
            if not os.path.isdir(directory):
                return
            if not _may(directory, os.X_OK):
                raise AccessError(f"you may not enter {directory}, {_whose(directory, stat.S_IXGRP)}")
        if path.is_socket() and not _may(path, os.W_OK):
            raise AccessError(f"you may not open {path}, {_whose(path, stat.S_IWGRP)}")


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _whose(path: Path, group_bit: int) -> str:
    """Say whose it is, and what to do about that."""
    found = path.stat()
    owner = _user_name(found.st_uid)
    if not found.st_mode & group_bit:
        return f"which is {owner}'s alone (mode {stat.S_IMODE(found.st_mode):04o}); run this as {owner}"
    group, user = _group_name(found.st_gid), _user_name(os.geteuid())
    return (
        f"which is for {owner} and the group {group}: `usermod -aG {group} {user}` as root, and log in again;"
        f" or run this as {owner}"
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)

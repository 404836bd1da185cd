"""Directories that the daemon makes for itself, before it has."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath

from cpe_daemon.doctor.finding import Judgement, fail, ok, skip
from cpe_daemon.doctor.host import Host


def judge_absent(
    host: Host, path: str, *, of_unit: Collection[str], by_unit: str, by_daemon: str, loss: str, mend: str
) -> Judgement:
    """Whether a directory that is not there can be made.

    Args:
        host: as it is seen.
        path: of the directory.
        of_unit: the directories that the daemon's unit has made.
        by_unit: says who makes it then.
        by_daemon: says who makes it where this user may.
        loss: what follows if nobody does, after a colon; or "".
        mend: against that.
    """
    if path in of_unit:
        return ok(f"{path} is not there yet; {by_unit}")
    for parent in PurePosixPath(path).parents:
        entry = host.entry(str(parent))
        if entry is not None:
            if entry.writable:
                return ok(f"{path} is not there yet; {by_daemon}")
            return fail(f"{path} is not there, and this user may not make it in {parent}{loss}", mend)
    return skip(f"nothing on the way to {path} can be looked at")

"""Checks of the daemon's own settings and of its runtime directory."""

from __future__ import annotations

from typing import Final

from cpe_daemon.config import ENGINES_SOCKET, FRONT_SOCKET, HANDOFF_SOCKET
from cpe_daemon.doctor.directories import judge_absent
from cpe_daemon.doctor.finding import Judgement, fail, gib, ok, skip, warn
from cpe_daemon.doctor.host import Entry, Host
from cpe_daemon.doctor.subject import Subject
from cpe_daemon.doctor.systemd import SERVICE, unit, unit_config, unit_runtime_dirs

_OTHERS_MAY_WRITE: Final = 0o002


def judge_config(subject: Subject) -> Judgement:
    """Whether the settings are valid, and those of the daemon that runs or would be started."""
    if subject.needs is None:
        return fail(
            subject.settings, "correct it; `cpe config` shows what is in effect, `cpe config --default` explains"
        )
    theirs, whose = subject.their_config(), "the daemon that runs"
    if theirs is None and subject.owner() is None:
        theirs, whose = unit_config(subject.host), SERVICE
    if theirs is not None and theirs.startswith("/") and theirs != subject.config_path:
        return _others(f"{subject.settings}, and {whose} has {theirs}", f"`cpe doctor --config {theirs}`")
    arena, ours = subject.arena_bytes(), subject.needs.arena_bytes
    if arena is not None and arena != ours:
        return _others(
            f"{subject.settings}, with an arena of {gib(ours)}, and the daemon that runs has one of {gib(arena)}",
            "give the daemon's own settings (--config, --set); if they have changed since, restart it",
        )
    return ok(subject.settings)


def _others(found: str, mend: str) -> Judgement:
    """These are not the settings that matter."""
    return warn(f"{found}: the other checks looked for what these settings need", mend)


def judge_runtime_dir(subject: Subject) -> Judgement:
    """Whether the directory can be the daemon's alone, and whether one has it."""
    host, path = subject.host, subject.runtime_dir
    found = host.entry(path)
    if found is None:
        return judge_absent(
            host,
            path,
            of_unit=unit_runtime_dirs(host),
            by_unit=f"{SERVICE} makes it (RuntimeDirectory=)",
            by_daemon="the daemon makes it",
            loss="",
            mend="run the daemon from its unit (RuntimeDirectory= makes it), as root, or with another runtime_dir",
        )
    if found.kind != "directory":
        return fail(f"{path} is a {found.kind}, and the daemon takes only a directory", f"remove it: `rm {path}`")
    if found.mode & _OTHERS_MAY_WRITE:
        return fail(
            f"{path} may be written to by everybody, who could replace the sockets in it", f"`chmod 0750 {path}`"
        )
    if subject.shut_out:
        return skip(f"{path} is {user_name(host, found.uid)}'s, and this user may not enter it: see daemon")
    owner = subject.owner()
    if owner is not None:
        answer = subject.answer()
        if answer is None:
            return ok(f"{path} is held by process {owner}, which starts a daemon")
        if answer.status is not None:
            return ok(f"{path} is held by the daemon (pid {owner})")
        return fail(
            f"{path} is held by process {owner}, which does not answer as a daemon",
            f"`ps -fp {owner}`; end it if it is stuck, or choose another runtime_dir",
        )
    if found.uid != host.uid:
        return _not_ours(host, path, found)
    stale = [
        name for name in (FRONT_SOCKET, ENGINES_SOCKET, HANDOFF_SOCKET) if host.entry(f"{path}/{name}") is not None
    ]
    if stale and not subject.status():
        return warn(
            f"{path} has {', '.join(stale)} of a daemon that was killed",
            "start the daemon, which removes them; until then clients wait in vain",
        )
    return ok(f"{path} is this user's alone (mode {found.mode:04o})")


def _not_ours(host: Host, path: str, found: Entry) -> Judgement:
    """Somebody else's directory is only good for somebody else's daemon."""
    owner = user_name(host, found.uid)
    if unit(host).get("User", "") == owner:
        return ok(f"{path} is {owner}'s, the user of {SERVICE}")
    text = f"{path} is {owner}'s, and a daemon of {user_name(host, host.uid)} refuses it"
    if host.uid == 0:
        return warn(text, f"run the daemon as {owner}, or choose another runtime_dir")
    return fail(text, f"run the daemon as {owner}, or choose another runtime_dir")


def user_name(host: Host, uid: int) -> str:
    """A user's name; "uid 990" for one without."""
    for line in (host.read("/etc/passwd") or "").splitlines():
        name, _, number, *_ = (*line.split(":"), "", "", "")
        if number == str(uid):
            return name
    return f"uid {uid}"

"""Checks of what the daemon keeps on disk: its state, and the keys of those who may connect over tcp."""

from __future__ import annotations

import json
from typing import Final

from cpe_daemon.config import JOURNAL_FILE
from cpe_daemon.doctor.directories import judge_absent
from cpe_daemon.doctor.finding import Judgement, fail, ok, skip, warn
from cpe_daemon.doctor.host import Entry, Host
from cpe_daemon.doctor.installation import user_name
from cpe_daemon.doctor.memory import NO_SETTINGS
from cpe_daemon.doctor.subject import Subject
from cpe_daemon.doctor.systemd import unit, unit_state_dirs
from cpe_daemon.links.allowed import ALLOWED
from cpe_daemon.links.keys import DAEMON_NAME, SECRET_SUFFIX

_FOR_OTHERS: Final = 0o077
_WRITABLE_BY_OTHERS: Final = 0o022


def judge_state_dir(subject: Subject) -> Judgement:
    """Whether the daemon can read what the one before has written down, and write it anew."""
    needs, host = subject.needs, subject.host
    if needs is None or not needs.state_dir:
        return skip(NO_SETTINGS)
    path = needs.state_dir
    found = host.entry(path)
    if found is None:
        return judge_absent(
            host,
            path,
            of_unit=unit_state_dirs(host),
            by_unit="systemd makes it (StateDirectory=)",
            by_daemon="the daemon makes it when it has something to write down",
            loss=": nothing survives a restart",
            mend=f"make it and give it to the daemon's user, or set another state_dir than {path}",
        )
    if found.kind not in {"directory", "link"}:
        return fail(f"{path} is a {found.kind}, and state_dir has to be a directory", "choose another state_dir")
    if found.kind == "directory" and not (found.writable and found.searchable):
        return _kept_out(subject, path, found, "write to")
    for file in (needs.engines_file, f"{path}/{JOURNAL_FILE}"):
        entry = host.entry(file)
        if entry is not None and host.read(file) is None:
            return _kept_out(subject, file, entry, "read")
    try:
        json.loads(host.read(needs.engines_file) or "{}")
    except ValueError as error:
        return fail(
            f"{needs.engines_file} is damaged ({error}), and the daemon does not start with it",
            "remove it, and say which engines are expected: `cpe engine add`",
        )
    return ok(f"{path} can be read and written")


def judge_keys(subject: Subject) -> Judgement:
    """Whether the daemon has its key pair, and knows a client, where it listens on tcp."""
    needs, host = subject.needs, subject.host
    if needs is None:
        return skip(NO_SETTINGS)
    if not needs.wants_curve:
        return skip("no tcp endpoint takes keys: ingest.listen has none, or ingest.insecure is true")
    directory = needs.keys_dir
    above = host.entry(directory)
    if above is not None and not above.searchable:
        return _kept_out(subject, directory, above, "enter")
    secret = f"{directory}/{DAEMON_NAME}{SECRET_SUFFIX}"
    found = host.entry(secret)
    if found is None:
        return fail(
            f"ingest.listen has tcp endpoints, which take keys, and the daemon has no pair: {secret} is not there",
            f"`cpe keys new --daemon --dir {directory}`, as the daemon's user; or ingest.insecure: true",
        )
    if found.kind == "file" and found.mode & _FOR_OTHERS:
        return fail(
            f"{secret} is open to others than its owner (mode {found.mode:04o}): the daemon refuses it",
            f"`chmod 600 {secret}`, and if others may have read it, make a new pair",
        )
    service = unit(host).get("User", "")
    if host.uid == 0 and service and found.kind == "file" and user_name(host, found.uid) != service:
        return fail(
            f"{secret} is {user_name(host, found.uid)}'s, and {service} could not read it",
            f"`chown -R {service}: {directory}`",
        )
    if host.read(secret) is None:
        return _kept_out(subject, secret, found, "read")
    return _clients(host, f"{directory}/{ALLOWED}", directory)


def _clients(host: Host, path: str, directory: str) -> Judgement:
    """Whether anybody is allowed."""
    found = host.entry(path)
    if found is not None and found.kind == "file" and found.mode & _WRITABLE_BY_OTHERS:
        return fail(
            f"{path} may be written by others than its owner (mode {found.mode:04o}): the daemon refuses it",
            f"`chmod 640 {path}`, and look at what is in it",
        )
    lines = [line.strip() for line in (host.read(path) or "").splitlines()]
    count = sum(1 for line in lines if line and not line.startswith("#"))
    if not count:
        return warn(
            f"the daemon has its keys in {directory}, and no client is allowed: nobody can connect over tcp",
            f"`cpe keys allow CLIENT.key --role trainer --dir {directory}`",
        )
    return ok(f"the daemon has its keys in {directory}, and {count} {'client is' if count == 1 else 'are'} allowed")


def _kept_out(subject: Subject, path: str, found: Entry, verb: str) -> Judgement:
    """What it means that this user may not do this: nothing, where the daemon is another user's."""
    host = subject.host
    whose, service = user_name(host, found.uid), unit(host).get("User", "")
    if subject.status() or (service and service != user_name(host, host.uid)):
        return skip(f"this user may not {verb} {path}, which is {whose}'s: run this as the daemon's user")
    return fail(
        f"this user may not {verb} {path}, which is {whose}'s: a daemon of this user's does not start",
        f"run the daemon as {whose}, or `chown -R {user_name(host, host.uid)}: {path}` as root",
    )

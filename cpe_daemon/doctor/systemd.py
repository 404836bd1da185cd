"""The check of the systemd unit, and what other checks want to know of it."""

from __future__ import annotations

import re
from typing import Final

from cpe_daemon.doctor.finding import Judgement, fail, gib, skip, warn, worst
from cpe_daemon.doctor.host import Host
from cpe_daemon.doctor.subject import Subject

SERVICE: Final = "cpe-daemon.service"

_PROPERTIES: Final = (
    "LoadState,ActiveState,Result,UnitFileState,User,ExecStart,LimitMEMLOCK,LimitNOFILE,MemoryMax,PrivateDevices,"
    "RuntimeDirectory,StateDirectory"
)
_COMMAND: Final = ("systemctl", "show", SERVICE, f"--property={_PROPERTIES}")
_ASK_SECONDS: Final = 5.0


def unit(host: Host) -> dict[str, str]:
    """Return the unit's properties; {} where systemd does not run or does not say."""
    if host.entry("/run/systemd/system") is None:  # as sd_booted(3) finds out
        return {}
    ran = host.run(_COMMAND, _ASK_SECONDS)
    if ran is None or ran.status != 0:
        return {}
    return dict(line.split("=", 1) for line in ran.out.splitlines() if "=" in line)


def unit_bytes(value: str) -> int | None:
    """Return a limit of the unit's; None for "infinity", and for what is no number."""
    return int(value) if value.isdigit() else None


def unit_config(host: Host) -> str | None:
    """Return the file that the unit's command names with --config; None if it names none."""
    # ExecStart={ path=/usr/bin/cpe ; argv[]=/usr/bin/cpe serve --config /etc/cpe.yaml ; ignore_errors=no ; ... }
    found = re.search(r"--config[= ](\S+)", unit(host).get("ExecStart", ""))
    return found[1] if found else None


def unit_runtime_dirs(host: Host) -> list[str]:
    """Return the directories that the unit has made for the daemon when it starts, if it is installed."""
    return _made_by_unit(host, "RuntimeDirectory", "/run")


def unit_state_dirs(host: Host) -> list[str]:
    """Return the directories of the unit's that survive a restart, if it is installed."""
    return _made_by_unit(host, "StateDirectory", "/var/lib")


def _made_by_unit(host: Host, name: str, where: str) -> list[str]:
    shown = unit(host)
    names = shown.get(name, "") if shown.get("LoadState") == "loaded" else ""
    return [f"{where}/{inside}" for inside in names.split()]


def judge_systemd(subject: Subject) -> Judgement:
    """Whether the unit is installed, may take what it needs, and did not fail."""
    host = subject.host
    if host.entry("/run/systemd/system") is None:
        return skip("systemd does not run here")
    shown = unit(host)
    if not shown:
        return skip("systemctl does not answer")
    if shown.get("LoadState") != "loaded":
        state = shown.get("LoadState", "unknown")
        if state in {"not-found", "unknown"}:
            return skip(f"{SERVICE} is not installed", "to have the daemon started at boot, install the unit")
        return fail(f"{SERVICE} is {state}", f"`systemctl status {SERVICE}` says why")
    states = f"{shown.get('UnitFileState') or 'installed'}, {shown.get('ActiveState') or 'unknown'}"
    limits = f"LimitMEMLOCK={shown.get('LimitMEMLOCK')}, MemoryMax={shown.get('MemoryMax')}"
    return worst(_misfits(subject, shown), f"{SERVICE} is {states}; {limits}")


def _misfits(subject: Subject, shown: dict[str, str]) -> list[Judgement]:
    """All that is wrong with a unit that is there."""
    found: list[Judgement] = []
    if shown.get("ActiveState") == "failed":
        why = shown.get("Result") or "failed"
        found.append(fail(f"{SERVICE} has failed ({why})", f"`journalctl -u {SERVICE} -n 50` says why"))
    needs = subject.needs
    locked, most = unit_bytes(shown.get("LimitMEMLOCK", "")), unit_bytes(shown.get("MemoryMax", ""))
    if needs is not None and locked is not None and locked < needs.arena_bytes:
        found.append(
            warn(
                f"LimitMEMLOCK={gib(locked)} is less than the arena of {gib(needs.arena_bytes)}",
                f"`systemctl edit {SERVICE}`: LimitMEMLOCK=infinity",
            )
        )
    if needs is not None and most is not None and most < needs.memory_bytes:
        found.append(
            fail(
                f"MemoryMax={gib(most)} is less than the {gib(needs.memory_bytes)} that are taken at start",
                f"`systemctl edit {SERVICE}`: raise MemoryMax, or lower arena.size_bytes",
            )
        )
    if shown.get("PrivateDevices") == "yes" and (needs is None or needs.wants_gpu or _has_gpus(subject.host)):
        found.append(
            fail("PrivateDevices=yes hides the GPUs from the daemon", f"`systemctl edit {SERVICE}`: PrivateDevices=no")
        )
    if shown.get("UnitFileState") == "disabled":
        found.append(warn(f"{SERVICE} is not started at boot", f"`systemctl enable {SERVICE}`"))
    return found


def _has_gpus(host: Host) -> bool:
    return bool(host.names("/proc/driver/nvidia/gpus"))

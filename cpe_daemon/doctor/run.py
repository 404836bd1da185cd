"""All checks, and how they are run: at once, each within the deadline, none hiding another's finding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from cpe_daemon.doctor.at_once import at_once
from cpe_daemon.doctor.finding import Finding, Judgement, fail, warn
from cpe_daemon.doctor.gpus import judge_compute_mode, judge_gpus, judge_mig
from cpe_daemon.doctor.installation import judge_config, judge_runtime_dir
from cpe_daemon.doctor.interconnect import judge_pcie, judge_peer_access
from cpe_daemon.doctor.keeping import judge_keys, judge_state_dir
from cpe_daemon.doctor.kernel import judge_files, judge_kernel, judge_numa
from cpe_daemon.doctor.memory import judge_hugepages, judge_memlock, judge_memory
from cpe_daemon.doctor.mooncake import judge_mooncake
from cpe_daemon.doctor.network import judge_endpoints, judge_rdma
from cpe_daemon.doctor.serving import judge_daemon, judge_engine_urls, judge_engines
from cpe_daemon.doctor.software import judge_python, judge_torch, judge_zeromq
from cpe_daemon.doctor.subject import Subject
from cpe_daemon.doctor.systemd import judge_systemd

DEADLINE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Check:
    """One point that is looked at."""

    name: str
    group: str
    judge: Callable[[Subject], Judgement]


CHECKS: Final = (
    Check("config", "installation", judge_config),
    Check("runtime-dir", "installation", judge_runtime_dir),
    Check("state-dir", "installation", judge_state_dir),
    Check("keys", "installation", judge_keys),
    Check("systemd", "installation", judge_systemd),
    Check("kernel", "host", judge_kernel),
    Check("memory", "host", judge_memory),
    Check("memlock", "host", judge_memlock),
    Check("hugepages", "host", judge_hugepages),
    Check("files", "host", judge_files),
    Check("numa", "host", judge_numa),
    Check("gpus", "gpus", judge_gpus),
    Check("pcie", "gpus", judge_pcie),
    Check("peer-access", "gpus", judge_peer_access),
    Check("compute-mode", "gpus", judge_compute_mode),
    Check("mig", "gpus", judge_mig),
    Check("rdma", "network", judge_rdma),
    Check("endpoints", "network", judge_endpoints),
    Check("python", "software", judge_python),
    Check("torch", "software", judge_torch),
    Check("zeromq", "software", judge_zeromq),
    Check("mooncake", "software", judge_mooncake),
    Check("daemon", "serving", judge_daemon),
    Check("engines", "serving", judge_engines),
    Check("engine-urls", "serving", judge_engine_urls),
)
"""In the order in which they are shown."""


def examine(
    subject: Subject,
    *,
    only: Collection[str] = (),
    checks: Collection[Check] = CHECKS,
    seconds: float = DEADLINE_SECONDS,
    waiting: Callable[[list[str]], None] = lambda names: None,
) -> list[Finding]:
    """Run checks, and return their findings in order.

    Args:
        subject: what to examine.
        only: names of the checks to run; none for all.
        checks: those that there are.
        seconds: what has not answered by then has failed.
        waiting: told which checks are still at work, whenever one has finished.
    """
    chosen = [check for check in checks if not only or check.name in only]
    judged: dict[str, Judgement] = {}
    for number, judgement in at_once([functools.partial(_judge, check, subject) for check in chosen], seconds):
        judged[chosen[number].name] = judgement
        waiting([check.name for check in chosen if check.name not in judged])
    late = fail(f"did not finish within {seconds:g} s", "look in `ps` and `dmesg` for what hangs on this host")
    return [_finding(check, judged.get(check.name, late)) for check in chosen]


def _finding(check: Check, judgement: Judgement) -> Finding:
    return Finding(check.name, check.group, judgement.verdict, judgement.found, judgement.mend)


def _judge(check: Check, subject: Subject) -> Judgement:
    try:
        return check.judge(subject)
    except Exception as error:  # task boundary: what one check stumbles over must not hide what the others find
        return warn(
            f"the check itself failed: {type(error).__name__}: {error}",
            "this is a bug in cpe: report it with the output of `cpe doctor --json`",
        )

"""What may keep a host from running the daemon, found before it does: `cpe doctor`.

`host` is the only module that looks at the machine. Checks are functions of what it says, and of the settings and the
daemon's answer that they are handed (`subject`); `run` runs them all, each within a deadline. Nothing here changes
anything, and what cannot be found out is skipped, with why.
"""

from cpe_daemon.doctor.finding import Finding, Verdict
from cpe_daemon.doctor.host import Host, LiveHost
from cpe_daemon.doctor.run import CHECKS, Check, examine
from cpe_daemon.doctor.subject import Answer, EngineUrl, Needs, Subject

__all__ = [
    "CHECKS",
    "Answer",
    "Check",
    "EngineUrl",
    "Finding",
    "Host",
    "LiveHost",
    "Needs",
    "Subject",
    "Verdict",
    "examine",
]

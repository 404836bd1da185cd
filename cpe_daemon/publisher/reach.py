"""Where daemons are, and which of them answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpe_daemon.errors import CpeError
from cpe_daemon.publisher.session import Session


@dataclass(frozen=True, slots=True)
class Reach:
    """Which daemons can be reached, and why the others cannot, by endpoint."""

    sessions: dict[str, Session]
    failures: dict[str, CpeError]

    @property
    def one_ring_size(self) -> bool:
        """Whether every session has a landing ring, all with chunks of one size: then they can be filled in step."""
        sizes = {session.welcome.chunk_bytes for session in self.sessions.values()}
        return len(sizes) == 1 and all(session.landing for session in self.sessions.values())

    @property
    def folds(self) -> bool:
        """Whether a daemon folds what it is sent, unless the rank has done it."""
        return any(session.welcome.folds for session in self.sessions.values())


def endpoint_of(name: str) -> str:
    """Spell a runtime directory, or the socket in it, out as an endpoint."""
    if "://" in name or "/" not in name:
        return name
    path = Path(name)
    return f"ipc://{path if path.suffix == '.sock' else path / 'front.sock'}"


def this_boot() -> str:
    """This boot of this host; the same for all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

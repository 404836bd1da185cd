"""What is examined: a host, what the settings ask of it, and what its daemon says if one runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cpe_daemon.config import ENGINES_FILE, FRONT_SOCKET
from cpe_daemon.doctor.host import Host, Once

if TYPE_CHECKING:
    from cpe_daemon.config import Config

LOCK_FILE: Final = "daemon.lock"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a daemon with these settings asks of its host. Sizes in bytes.

    Args:
        arena_bytes: of the arena.
        slot_bytes: of all slots that are in host memory.
        ring_bytes: of one trainer rank's landing ring.
        max_trainers: ranks that may be connected at once.
        endpoints: where it shall listen, besides its own sockets; its HTTP listener included.
        engines_file: where it keeps the engines that it shall expect.
        state_dir: where it keeps what shall survive it.
        keys_dir: where it looks for its keys.
        wants_gpu: whether its slots are in GPUs.
        wants_curve: whether it shall ask clients over tcp for keys.
    """

    arena_bytes: int
    slot_bytes: int = 0
    ring_bytes: int = 0
    max_trainers: int = 1024
    endpoints: tuple[str, ...] = ()
    engines_file: str = ""
    state_dir: str = ""
    keys_dir: str = ""
    wants_gpu: bool = False
    wants_curve: bool = False

    @property
    def memory_bytes(self) -> int:
        """Host memory that is taken at start, or when engines attach."""
        return self.arena_bytes + self.slot_bytes

    @classmethod
    def of(cls, config: Config) -> Needs:
        """Return what ``config`` asks for."""
        in_memory = str(config.device.kind) == "shm"
        slots = config.device.gpus * config.device.slots_for(0) * config.device.slot_bytes
        scheme = "https" if config.http.tls_certificate else "http"
        http = (f"{scheme}://{config.http.listen}",) if config.http.listen else ()
        over_tcp = any(endpoint.startswith("tcp://") for endpoint in config.ingest.listen)
        return cls(
            arena_bytes=config.arena.size_bytes,
            slot_bytes=slots if in_memory else 0,
            ring_bytes=config.ingest.landing_credits * config.ingest.landing_chunk_bytes,
            max_trainers=config.ingest.max_trainers,
            endpoints=(*config.ingest.listen, *http),
            engines_file=str(config.state_dir / ENGINES_FILE),
            state_dir=str(config.state_dir),
            keys_dir=str(config.security.keys_dir),
            wants_gpu=not in_memory,
            wants_curve=over_tcp and not config.ingest.insecure,
        )


@dataclass(frozen=True, slots=True)
class EngineUrl:
    """An engine's server, to be asked for its health: its name, its kind ("vllm", "sglang"), and where it listens."""

    name: str
    kind: str
    url: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the daemon said when it was asked for its status.

    Args:
        status: what `cpe_daemon.status` describes; None if it did not say.
        problem: why not.
        seconds: how long it took.
    """

    status: Mapping[str, Any] | None
    problem: str = ""
    seconds: float = 0.0


class Subject:
    """One host, looked at once.

    Args:
        host: the machine.
        runtime_dir: of its daemon.
        needs: what the settings ask for; None if they are not valid.
        settings: what is to be said of the settings: where they are from, or all that is wrong with them.
        config_path: their file; None if there is none.
        ask: asks the daemon for its status; called at most once, and only if the daemon has a socket.
        engines: servers of engines, to be asked for their health.
    """

    def __init__(
        self,
        host: Host,
        *,
        runtime_dir: str,
        needs: Needs | None,
        ask: Callable[[], Answer],
        settings: str = "valid",
        config_path: str | None = None,
        engines: Sequence[EngineUrl] = (),
    ) -> None:
        self.host = host
        self.runtime_dir = runtime_dir
        self.needs = needs
        self.settings = settings
        self.config_path = config_path
        self.engines = tuple(engines)
        self._ask = Once(ask)

    @property
    def front(self) -> str:
        """Path of the socket that a daemon answers at."""
        return f"{self.runtime_dir}/{FRONT_SOCKET}"

    @property
    def shut_out(self) -> bool:
        """Whether this user may not enter the runtime directory, and so cannot tell whether a daemon is there."""
        directory = self.host.entry(self.runtime_dir)
        return directory is not None and not directory.searchable

    def answer(self) -> Answer | None:
        """Return what the daemon says; None if it has no socket, so that there is none to ask."""
        return None if self.host.entry(self.front) is None else self._ask()

    def status(self) -> Mapping[str, Any]:
        """Return the daemon's status; {} if there is none."""
        answer = self.answer()
        return answer.status or {} if answer is not None else {}

    def arena_bytes(self) -> int | None:
        """Return the arena's size: of the daemon that runs, else of the settings; None if they are not valid."""
        arena = self.status().get("arena")
        size = arena.get("size_bytes") if isinstance(arena, Mapping) else None
        if isinstance(size, int):
            return size
        return None if self.needs is None else self.needs.arena_bytes

    def owner(self) -> int | None:
        """Return the process that holds the runtime directory's lock, a daemon's; None if none does.

        The kernel is asked, not the file: a killed daemon leaves its number there, which another process may have got.
        Only where the kernel calls the file system by another name than its files do (btrfs, overlayfs), the number in
        the file has to be the lock's.
        """
        path = f"{self.runtime_dir}/{LOCK_FILE}"
        lock = self.host.entry(path)
        locks = self.host.read("/proc/locks")
        if lock is None or locks is None:
            return None
        for line in locks.splitlines():
            # "1: FLOCK  ADVISORY  WRITE 4242 00:1a:1234 0 EOF"; who waits for a lock has "->" before its kind
            fields = line.split()
            if fields[1:2] != ["FLOCK"] or fields[3] != "WRITE":
                continue
            pid, (device, _, inode) = fields[4], fields[5].rpartition(":")
            if inode == str(lock.inode) and (device == lock.device or pid == (self.host.read(path) or "").strip()):
                return int(pid)
        return None

    def silent(self) -> int | None:
        """Return the process that holds the lock and does not answer, so that nobody knows what it has taken."""
        return None if self.status() else self.owner()

    def their_config(self) -> str | None:
        """Return the file that the daemon which runs has its settings from; None if it does not show one."""
        owner = self.owner()
        words = (self.host.read(f"/proc/{owner}/cmdline") or "").split("\0") if owner is not None else []
        named = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
        named += [after for word, after in itertools.pairwise(words) if word == "--config"]
        if owner is not None and (variable := self.variable("CPE_CONFIG")):
            named.append(variable)
        return named[0] if named else None

    def variable(self, name: str) -> str:
        """Return a variable of the daemon's environment, if one runs, else of the user's; empty if it is not set."""
        owner = self.owner()
        if owner is None:
            return self.host.environ.get(name, "")
        entries = (self.host.read(f"/proc/{owner}/environ") or "").split("\0")
        return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), "")

    def process(self) -> tuple[str, str]:
        """Return the directory in /proc of the process whose limits count, the daemon's or this one, and its name."""
        owner = self.owner()
        if owner is not None and self.host.read(f"/proc/{owner}/limits") is not None:
            return f"/proc/{owner}", f"the daemon (pid {owner})"
        return "/proc/self", "this user's processes"

    def limit(self, name: str) -> int | None:
        """Return a soft limit of that process, such as "Max open files"; None: unlimited.

        Raises:
            LookupError: the kernel does not say.
        """
        place, _ = self.process()
        found = re.search(rf"^{re.escape(name)}\s+(\S+)", self.host.read(f"{place}/limits") or "", re.MULTILINE)
        if found is None:
            raise LookupError(f"{place}/limits does not name {name!r}")
        return None if found[1] == "unlimited" else int(found[1])

    def process_status(self, name: str) -> str:
        """Return a line of that process's /proc status, such as "CapEff"; empty if it has none."""
        place, _ = self.process()
        return field(self.host.read(f"{place}/status") or "", name)


def field(text: str, name: str) -> str:
    """Return what follows "NAME:" on its line, as /proc writes it; empty if nothing does."""
    found = re.search(rf"^{re.escape(name)}:[ \t]*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cores(text: str) -> set[int]:
    """Return the numbers of a kernel's list, such as "0-3,8"."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.strip().isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def cores_text(numbers: Iterable[int]) -> str:
    """Write numbers as the kernel does: "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(str(end) for end in run) for run in runs)

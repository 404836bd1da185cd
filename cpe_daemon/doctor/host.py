"""The host as the checks see it: files, commands, ports and URLs behind one interface. So a host can be recorded.

No call raises for what a host may lack, and none waits for ever: even a command that cannot be killed, for it hangs in
a GPU's driver, is given up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

T = TypeVar("T")

PYTHON: Final = "python"
"""As a command's first word: the interpreter that the daemon would run in."""

_MOST_BYTES: Final = 1 << 20
"""More than any file here has. Of /proc/sys nobody may ask for 4 MiB at once: the kernel answers ENOMEM."""

_REAP_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended. ``status`` is negative for a signal, and None if it did not end in time."""

    status: int | None
    out: str = ""
    err: str = ""

    @property
    def said(self) -> str:
        """Its last line, of what it said in complaint if it did: what a person would quote."""
        lines = [line.strip() for line in (self.err.strip() or self.out.strip()).splitlines() if line.strip()]
        return lines[-1] if lines else f"status {self.status}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry itself; a link is not followed.

    Args:
        kind: "directory", "socket", "link", "file" or "other".
        uid: of its owner.
        gid: of its group.
        mode: its permissions.
        inode: its number on its file system.
        device: that file system, as /proc writes it: "00:1a".
        writable: whether this process may write to it.
        searchable: of a directory, whether this process may look at what is in it by name.
    """

    kind: str
    uid: int = 0
    gid: int = 0
    mode: int = 0o755
    inode: int = 0
    device: str = ""
    writable: bool = True
    searchable: bool = True


class Host(Protocol):
    """A machine, or the record of one."""

    @property
    def uid(self) -> int:
        """The user that looks."""
        ...

    @property
    def environ(self) -> Mapping[str, str]:
        """That user's environment."""
        ...

    def read(self, path: str) -> str | None:
        """Return a file's text; None if it is not there or may not be read."""
        ...

    def names(self, path: str) -> list[str] | None:
        """Return what is in a directory, sorted; None if it is not there or may not be read."""
        ...

    def entry(self, path: str) -> Entry | None:
        """Return what stands at a path; None if nothing does, or nobody may know."""
        ...

    def run(self, command: Sequence[str], seconds: float) -> Ran | None:
        """Run a command, for at most ``seconds``; None if there is no such program. Asked again, the answer stays."""
        ...

    def refuses(self, address: str, port: int) -> str | None:
        """Return the name of the error with which listening there fails, such as "EADDRINUSE"; None: it would work."""
        ...

    def get(self, url: str, seconds: float) -> int | str:
        """GET a URL; return the status of the answer, or why there is none."""
        ...


class Once(Generic[T]):
    """A value that the first who asks finds out, while others who ask wait for it. Thread-safe."""

    def __init__(self, find: Callable[[], T]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._found: list[T] = []

    def __call__(self) -> T:
        """Return the value. An error of finding it is the caller's, and the next who asks tries again."""
        with self._lock:
            if not self._found:
                self._found.append(self._find())
            return self._found[0]


class LiveHost:
    """The machine that this process runs on. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commands: dict[tuple[str, ...], Once[Ran | None]] = {}

    @property
    def uid(self) -> int:
        """The user that looks."""
        return os.geteuid()

    @property
    def environ(self) -> Mapping[str, str]:
        """That user's environment."""
        return os.environ

    def read(self, path: str) -> str | None:
        """Return a file's text; None if it is not there or may not be read."""
        try:
            with Path(path).open("rb") as file:
                return file.read(_MOST_BYTES).decode(errors="replace")
        except (OSError, ValueError):
            return None

    def names(self, path: str) -> list[str] | None:
        """Return what is in a directory, sorted; None if it is not there or may not be read."""
        try:
            return sorted(os.listdir(path))
        except (OSError, ValueError):
            return None

    def entry(self, path: str) -> Entry | None:
        """Return what stands at a path; None if nothing does, or nobody may know."""
        try:
            found = os.lstat(path)
        except (OSError, ValueError):
            return None
        kinds = {stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket", stat.S_IFLNK: "link", stat.S_IFREG: "file"}
        return Entry(
            kinds.get(stat.S_IFMT(found.st_mode), "other"),
            uid=found.st_uid,
            gid=found.st_gid,
            mode=stat.S_IMODE(found.st_mode),
            inode=found.st_ino,
            device=f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}",
            writable=_may(path, os.W_OK),
            searchable=_may(path, os.X_OK),
        )

    def run(self, command: Sequence[str], seconds: float) -> Ran | None:
        """Run a command, for at most ``seconds``; None if there is no such program. Asked again, the answer stays."""
        key = tuple(command)
        with self._lock:
            once = self._commands.setdefault(key, Once(lambda: _execute(key, seconds)))
        return once()

    def refuses(self, address: str, port: int) -> str | None:
        """Return the name of the error with which listening there fails, such as "EADDRINUSE"; None: it would work."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does
                probe.bind((address, port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        return None

    def get(self, url: str, seconds: float) -> int | str:
        """GET a URL; return the status of the answer, or why there is none."""
        import http.client
        import urllib.error
        import urllib.request

        if url.startswith("unix://"):
            path, _, route = url.removeprefix("unix://").rpartition("/")
            return _get_by_socket(path, f"/{route}", seconds)
        if not url.startswith(("http://", "https://")):
            return "is neither an http nor a unix URL"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an engine of this node is behind none
        try:
            with direct.open(url, timeout=seconds) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except urllib.error.URLError as error:
            return str(error.reason)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__


def _get_by_socket(path: str, route: str, seconds: float) -> int | str:
    """As `LiveHost.get`, on a Unix socket."""
    import http.client

    connection = http.client.HTTPConnection("localhost", timeout=seconds)
    try:
        with contextlib.closing(connection), socket.socket(socket.AF_UNIX) as connected:
            connected.settimeout(seconds)
            connected.connect(path)
            connection.sock = connected
            connection.request("GET", route)
            return connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _may(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _execute(command: tuple[str, ...], seconds: float) -> Ran | None:
    words = (sys.executable, *command[1:]) if command[0] == PYTHON else command
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={**os.environ, "LC_ALL": "C"},
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return None
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang where no signal reaches it
            process.communicate(timeout=_REAP_SECONDS)
        return Ran(None)
    return Ran(process.returncode, out, err)

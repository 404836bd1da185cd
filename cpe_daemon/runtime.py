"""The runtime directory: one live daemon owns it, and what a killed one left in it is removed."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from cpe_daemon.config import ENGINES_SOCKET, FRONT_SOCKET, HANDOFF_SOCKET
from cpe_daemon.errors import ConfigError, ResourceError


class RuntimeDirectory:
    """The directory of a daemon's sockets, owned by one live process at a time.

    Raises:
        ConfigError: it cannot be used.
        ResourceError: another daemon owns it, which is left unharmed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    def __enter__(self) -> RuntimeDirectory:
        try:
            self.path.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._check_owned()
            self._lock = os.open(self.path / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise ResourceError(
                f"another daemon (pid {owner}) runs on {self.path}; give this one its own runtime_dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot use runtime directory {self.path}: {error}") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        for name in (FRONT_SOCKET, ENGINES_SOCKET, HANDOFF_SOCKET):
            (self.path / name).unlink(missing_ok=True)  # of a daemon that was killed
        return self

    def _check_owned(self) -> None:
        """Refuse a directory that somebody else made, in /tmp say: they could replace the sockets in it.

        Raises:
            ConfigError: it is another user's, others may write to it, or it is a link.
        """
        found, user = os.lstat(self.path), os.getuid()
        if not stat.S_ISDIR(found.st_mode):
            why = "it is a link, or no directory"
        elif found.st_uid != user:
            why = f"it belongs to uid {found.st_uid}, and this daemon runs as uid {user}"
        elif found.st_mode & stat.S_IWOTH:
            why = f"everybody may write to it (mode {stat.S_IMODE(found.st_mode):04o})"
        else:
            return
        raise ConfigError(
            f"runtime directory {self.path} is not this user's alone: {why}; mend that, or give another as runtime_dir"
        )

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

"""A small file that survives restarts: read whole at start, and replaced whole, unless somebody else has changed it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from cpe_daemon.errors import BusyError, ConfigError, DeadlineError, ResourceError

_WRITE_SECONDS: Final = 10.0
_DIRECTORY_MODE: Final = 0o750
_FILE_MODE: Final = 0o640


class StateFile:
    """One file of one daemon. Belongs to the event loop, and is written by a thread, one `replace` after another.

    A write that was given up goes on in its thread, and the next one waits for it.

    Args:
        path: of the file; it need not exist, nor its directory, which is made when something is first written.
        recreate: one that somebody has removed is written anew. Otherwise that is a change as any other.

    Raises:
        ConfigError: it is there and cannot be read.
    """

    def __init__(self, path: Path, *, recreate: bool = False) -> None:
        self.path = path
        self._recreate = recreate
        self._writing: asyncio.Future[None] | None = None
        self.content: bytes | None = None
        """What it held when it was last read or written; None if there was none."""
        _clean_up(path)
        try:
            self.content = _read(path)
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}; let this user read it, or set another state_dir"
            ) from None

    @property
    def stuck(self) -> bool:
        """Whether a write is under way; after a `replace` that is over, one that was given up."""
        return self._writing is not None

    async def replace(self, content: bytes, seconds: float | None = None) -> None:
        """Have it hold ``content`` from now on, after a crash too.

        Raises:
            BusyError: somebody else has changed it; it is left as it is.
            ResourceError: it cannot be written, and is as it was.
            DeadlineError: the disk is stuck for ``seconds`` (None: 10); the file may be replaced later.
        """
        seconds = _WRITE_SECONDS if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                while self._writing is not None:
                    await asyncio.wait((self._writing,))
                writing = asyncio.ensure_future(
                    asyncio.to_thread(_replace, self.path, content, self.content, self._recreate)
                )
                self._writing = writing
                writing.add_done_callback(partial(self._written, content))
                await asyncio.shield(writing)
        except TimeoutError:
            raise DeadlineError(f"{self.path} was not written within {seconds:g} s; is its disk well?") from None

    def _written(self, content: bytes, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled() and writing.exception() is None:
            self.content = content


def _clean_up(path: Path) -> None:
    """Remove what processes that were killed in the midst of a write have left."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f".{path.name}-*"):
            left.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace(path: Path, content: bytes, known: bytes | None, recreate: bool) -> None:
    """Replace a file that holds what is ``known``, or, to ``recreate`` it, is not there. Runs in a thread."""
    try:
        path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        found = _read(path)
        if found != known and not (recreate and found is None):
            raise BusyError(
                f"{path} was changed since this daemon read it: restart the daemon to have it read again, and give each"
                " daemon a state_dir of its own"
            )
        _put(path, content)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}; it is as it was") from None


def _put(path: Path, content: bytes) -> None:
    """Make a file that is whole on the disk before it gets the name."""
    fd, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, _FILE_MODE)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(fresh, path)
    finally:
        Path(fresh).unlink(missing_ok=True)  # it has gone, unless something went wrong
    with contextlib.suppress(OSError):  # not every file system can; the file has its name already
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

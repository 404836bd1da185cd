"""Whom a daemon lets in: the file ``allowed`` of its ``keys_dir``, a line a key, for people and for ``cpe keys``.

    # roles           public key                                name
    trainer           Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID  trainers
    operator,trainer  rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7  alice

A file with a mistake in it is refused whole, so that nobody is let in, or kept out, by a misprint.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cpe_daemon.core.roles import Role
from cpe_daemon.errors import BusyError, ConfigError, MisuseError
from cpe_daemon.links.keys import NAME, is_key, write_new

ALLOWED: Final = "allowed"
"""Name of the file in ``keys_dir``."""

_HEADER: Final = "# Who may connect over tcp: roles, public key, name. `cpe keys` writes it; changes count at once.\n"
_MODE: Final = 0o640
_MAX_BYTES: Final = 1 << 20
_FIELDS: Final = 3
_GONE: Final = (-1,)
_UNREAD: Final = (-2,)
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Client:
    """The holder of a key, as the daemon knows it. ``public`` is in Z85."""

    name: str
    public: str
    roles: frozenset[Role]

    def __str__(self) -> str:
        """The client's line in the file."""
        return f"{','.join(sorted(self.roles)):<16}  {self.public}  {self.name}"


Clients = Mapping[str, Client]
"""Those who are allowed, by public key."""


def parse_allowed(text: str, source: str) -> Clients:
    """Return the clients of a file's text.

    Raises:
        ConfigError: a line is wrong; names all that are, with ``source`` and their numbers.
    """
    clients: dict[str, Client] = {}
    names: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            client = _client(line)
            if client.public in clients:
                raise ValueError(f"the key of {clients[client.public].name} again; remove one of the lines")
            if client.name in names:
                raise ValueError(f"another key is called {client.name} (line {names[client.name]}); rename one")
        except ValueError as error:
            problems.append(f"{source}:{number}: {error}")
        else:
            clients[client.public] = client
            names[client.name] = number
    if problems:
        raise ConfigError("\n  ".join(problems))
    return clients


def read_allowed(path: Path) -> Clients:
    """Read the file; one that is not there allows nobody.

    Raises:
        ConfigError: it cannot be read, is no regular file, others may write to it, or a line is wrong.
    """
    return parse_allowed(_text(path), str(path))


def allow(path: Path, client: Client) -> Client | None:
    """Add a client, or give the one with this key and name other roles; return what it was.

    Raises:
        ConfigError: the file cannot be used or written.
        BusyError: it is being changed by somebody else.
        MisuseError: the name or the key is another client's.
    """
    with _edited(path) as (clients, rewrite):
        known = clients.get(client.public)
        if known is not None and known.name != client.name:
            raise MisuseError(f"this key is allowed already, as {known.name}; revoke that first, or use its name")
        if any(other.name == client.name and other is not known for other in clients.values()):
            raise MisuseError(f"another key is called {client.name}; revoke it first, or choose another name")
        if known != client:
            rewrite(known, client)
        return known


def revoke(path: Path, wanted: str) -> Client:
    """Remove the client with a name or a public key, and return it.

    Raises:
        ConfigError: the file cannot be used or written.
        BusyError: it is being changed by somebody else.
        MisuseError: there is no such client.
    """
    with _edited(path) as (clients, rewrite):
        client = clients.get(wanted) or next((c for c in clients.values() if c.name == wanted), None)
        if client is None:
            names = ", ".join(sorted(c.name for c in clients.values())) or "none"
            raise MisuseError(f"no key {wanted!r} is allowed in {path}; there are: {names}")
        rewrite(client, None)
        return client


class AllowedFile:
    """The file as a running daemon follows it. Its methods block, perhaps for ever: call them in a thread.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] = ()

    def afresh(self) -> AllowedFile:
        """Return one that reads the file at its next call whatever was read before, for when a call has not ended."""
        fresh = AllowedFile(self.path)
        fresh._seen = _UNREAD
        return fresh

    def read_if_changed(self) -> Clients | None:
        """Return the clients if the file is another one than at the last call, else None.

        Raises:
            ConfigError: it is another one, and cannot be used. Said once for each such file.
        """
        seen = self._look()
        if seen == self._seen:
            return None
        first, self._seen = not self._seen, seen
        if seen == _GONE and not first:
            raise ConfigError(f"{self.path} is gone; to allow nobody, leave an empty file there")
        clients = read_allowed(self.path)
        if seen != _GONE:
            self._check_owners()
        return clients

    def _look(self) -> tuple[int, ...]:
        """What is another whenever the file is, or who may replace it."""
        try:
            found, above = os.stat(self.path), os.stat(self._directory)
        except FileNotFoundError:
            return _GONE
        except OSError as error:
            return (error.errno or 0,)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, above.st_mode

    def _check_owners(self) -> None:
        """Refuse a file that somebody else than root and this user could have written or replaced.

        Raises:
            ConfigError: it is one.
        """
        try:
            owner, above = os.stat(self.path).st_uid, os.stat(self._directory)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be looked at: {error.strerror or error}") from None
        if owner not in (0, os.geteuid()):
            raise ConfigError(
                f"{self.path} belongs to user {owner}, who could let anybody in; it has to be root's or this user's:"
                f" chown {os.geteuid()} {self.path}, and look at what is in it"
            )
        if above.st_mode & _WRITABLE_BY_OTHERS:
            raise ConfigError(
                f"{self._directory} may be written by others than its owner (mode {stat.S_IMODE(above.st_mode):04o}),"
                f" who could put another list in the place of {self.path}; chmod go-w {self._directory}"
            )

    @property
    def _directory(self) -> Path:
        """Where the file really is: a Kubernetes Secret is reached by links."""
        return self.path.resolve().parent


def _client(line: str) -> Client:
    """Return the client of one line.

    Raises:
        ValueError: it is not one; says why.
    """
    fields = line.split()
    if len(fields) != _FIELDS:
        raise ValueError(f"has {len(fields)} fields; write roles, public key and name, such as: trainer KEY alice")
    roles, public, name = fields
    unknown = [role for role in roles.split(",") if role not in set(Role)]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no role; there are {', '.join(Role)}, joined by commas")
    if not is_key(public):
        raise ValueError(f"{public!r} is no public key")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits and . _ @ - only, at most 64")
    return Client(name, public, frozenset(map(Role, roles.split(","))))


def _text(path: Path) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a FIFO would wait
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is no regular file")
    if mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(
            f"{path} may be written by others than its owner (mode {stat.S_IMODE(mode):04o}), who could let anybody in;"
            f" chmod 640 {path}, and look at what is in it"
        )
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_BYTES} bytes")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: holds bytes that are not ASCII") from None


@contextlib.contextmanager
def _edited(path: Path) -> Iterator[tuple[Clients, Callable[[Client | None, Client | None], None]]]:
    """Give the clients, and what puts one in another's place; nobody else edits meanwhile, and comments stay."""
    path = path.resolve()  # a link stays one
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"directory {path.parent} cannot be used: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"somebody else is changing {path} right now; try again") from None
        text = _text(path)

        def rewrite(old: Client | None, new: Client | None) -> None:
            lines = (text or _HEADER).splitlines()
            kept = [line for line in lines if old is None or not _is_line_of(old, line)]
            _replace(path, "\n".join([*kept, *([str(new)] if new else [])]) + "\n")

        yield parse_allowed(text, str(path)), rewrite
    finally:
        os.close(directory)


def _is_line_of(client: Client, line: str) -> bool:
    return not line.lstrip().startswith("#") and line.split()[1:] == [client.public, client.name]


def _replace(path: Path, text: str) -> None:
    """Put a new file in the old one's place, at once."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_new(fresh, text, _MODE)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None

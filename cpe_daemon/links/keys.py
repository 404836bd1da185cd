"""Key pairs for CURVE, in the files that ZeroMQ's own tools read and write.

A pair is two files, ``NAME.key_secret`` and ``NAME.key``; the second, the public key alone, may be given to anybody.
Trainers import this module: it needs nothing but pyzmq.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85

from cpe_daemon.errors import ConfigError

DAEMON_NAME: Final = "daemon"
"""Name of the daemon's own pair in its ``keys_dir``."""

SECRET_SUFFIX: Final = ".key_secret"  # noqa: S105 - of a file
PUBLIC_SUFFIX: Final = ".key"

KEY_CHARS: Final = 40
"""Length of a key as people see it, in Z85; 32 bytes on the wire."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
"""What a key may be called."""

_NOT_PRIVATE: Final = stat.S_IRWXG | stat.S_IRWXO

PublicKey = str | Path
"""A public key in Z85, or the path of a file that holds one."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A public key and the secret that belongs to it, both in Z85. The secret is never shown."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client needs for a tcp endpoint: its own pair, and the key that the daemon must prove to have."""

    pair: KeyPair
    server_key: str


def new_pair() -> KeyPair:
    """Make a pair. Its public key does not begin with a dash, so that it can be typed as an argument.

    Raises:
        ConfigError: this pyzmq cannot do CURVE.
    """
    check_curve()
    while True:
        public, secret = (key.decode() for key in zmq.curve_keypair())
        if not public.startswith("-"):
            return KeyPair(public, secret)


def check_curve() -> None:
    """Refuse a pyzmq that was built without libsodium.

    Raises:
        ConfigError: it was.
    """
    if not zmq.has("curve"):
        raise ConfigError(
            f"this pyzmq (libzmq {zmq.zmq_version()}) was built without CURVE, so it can use no keys; install the"
            " wheel from PyPI: pip install --force-reinstall --only-binary pyzmq pyzmq"
        )


def load_pair(path: Path) -> KeyPair:
    """Read the pair in a secret file.

    Raises:
        ConfigError: it cannot be read, is no such file, or others could read it too.
    """
    check_curve()
    try:
        mode = path.stat().st_mode
        public, secret = _parsed(path)
    except OSError as error:
        owner = f"; its owner has to be this user (uid {os.geteuid()})" if isinstance(error, PermissionError) else ""
        raise ConfigError(f"key file {path} cannot be read: {error.strerror or error}{owner}") from None
    if not secret:
        hint = f"; give {path.name.removesuffix(PUBLIC_SUFFIX)}{SECRET_SUFFIX}" if path.suffix == PUBLIC_SUFFIX else ""
        raise ConfigError(f"key file {path} holds no secret key{hint}")
    if mode & _NOT_PRIVATE:
        raise ConfigError(
            f"key file {path} holds a secret and is open to others than its owner (mode {stat.S_IMODE(mode):04o});"
            f" chmod 600 {path}, and if others may have read it, make a new pair"
        )
    if not is_key(secret) or zmq.curve_public(secret.encode()).decode() != public:
        raise ConfigError(f"key file {path} is damaged: its secret key does not belong to its public key")
    return KeyPair(public, secret)


def load_public(path: Path) -> str:
    """Read the public key in a file of either kind.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        return _parsed(path)[0]
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror or error}") from None


def public_key(given: PublicKey) -> str:
    """Return the public key that is meant: a file's, or ``given`` itself.

    Raises:
        ConfigError: it is neither a file nor a key.
    """
    if isinstance(given, Path) or os.path.exists(given):
        return load_public(Path(given))
    if not is_key(given):
        raise ConfigError(f"{given!r} is neither a file nor a public key, which has {KEY_CHARS} characters of Z85")
    return given


def is_key(text: str) -> bool:
    """Whether a text is a key in Z85."""
    if len(text) != KEY_CHARS:
        return False
    try:
        raw_key(text)
    except ValueError:
        return False
    return True


def raw_key(key: str) -> bytes:
    """Return the 32 bytes of a key in Z85.

    Raises:
        ValueError: it is no key.
    """
    try:
        return z85.decode(key)
    except (KeyError, struct.error) as error:
        raise ValueError(f"{key!r} is no key: {error}") from None


def credentials(key: KeyPair | str | Path | None, server_key: PublicKey | None, endpoint: str) -> Credentials | None:
    """Return what ``endpoint`` needs of the keys that the user gave; None where none are used.

    Raises:
        ConfigError: one was given without the other, or cannot be used.
    """
    if not endpoint.startswith("tcp://") or (key is None and server_key is None):
        return None
    if key is None:
        raise ConfigError(f"a server key was given for {endpoint}, but no key of this side's own")
    if server_key is None:
        raise ConfigError(
            f"a key was given for {endpoint}, but not the daemon's public key, by which it is recognised: on its node"
            f" that is in {DAEMON_NAME}{PUBLIC_SUFFIX} of the keys_dir, and `cpe keys list` shows it"
        )
    return Credentials(key if isinstance(key, KeyPair) else load_pair(Path(key)), public_key(server_key))


def server_key_for(endpoint: str, given: PublicKey | Mapping[str, PublicKey] | None) -> PublicKey | None:
    """Return the key of the daemon at ``endpoint``, if ``given`` says one for each; else ``given`` itself."""
    return given.get(endpoint) if isinstance(given, Mapping) else given


def write_pair(directory: Path, name: str, pair: KeyPair) -> tuple[Path, Path]:
    """Write a pair to two new files, the secret one for its owner only; return their paths, the secret one first.

    Where root writes to somebody's directory, the files become that user's.

    Raises:
        ConfigError: a file is there already, or cannot be made.
    """
    secret_path, public_path = directory / f"{name}{SECRET_SUFFIX}", directory / f"{name}{PUBLIC_SUFFIX}"
    public = f'curve\n    public-key = "{pair.public}"\n'
    secret = f'{public}    secret-key = "{pair.secret}"\n'
    try:
        write_new(secret_path, f"# The secret key {name}: whoever reads this file has its rights.\n{secret}", 0o600)
        try:
            write_new(public_path, f"# The public key {name}.\n{public}", 0o644)
        except OSError:
            secret_path.unlink()
            raise
    except FileExistsError as error:
        raise ConfigError(
            f"{error.filename} is there already; choose another name or directory, or remove it first"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or directory}: {error.strerror or error}") from None
    return secret_path, public_path


def write_new(path: Path, text: str, mode: int) -> None:
    """Make a file that was not there, with ``mode`` from its first byte on, and have it on disk.

    Raises:
        OSError: it is there, or cannot be made; nothing is left behind.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            owner = path.parent.stat()
            if os.geteuid() == 0 and owner.st_uid != 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
            os.fchmod(fd, mode)  # whatever the umask took
            file.write(text)
            file.flush()
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _parsed(path: Path) -> tuple[str, str]:
    """Return the public and the secret key in a file; the latter may be empty."""
    try:
        public, secret = load_certificate(path)
        texts = public.decode("ascii"), (secret or b"").decode("ascii")
    except (ValueError, IndexError):  # IndexError: a line without its equals sign
        raise ConfigError(f"{path} is no key file: it names no public key") from None
    if not is_key(texts[0]):
        raise ConfigError(f"key file {path} is damaged: {texts[0]!r} is no key")
    return texts

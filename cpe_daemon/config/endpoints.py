"""Places where the daemon may listen, and what is wrong with those where it may not. Pure: binds nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

SOCKET_PATH_BYTES: Final = 107
"""Longest path of a unix socket: sun_path has 108 bytes, of which one ends it."""

SOCKET_NAME_BYTES: Final = 24
"""Room that a runtime directory must leave, with its slash, for the names of the sockets in it."""

_INTERFACE: Final = re.compile(r"[A-Za-z][\w.@-]{0,14}", re.ASCII)
_MAX_PORT: Final = 65535
_OCTETS: Final = 4


def check_endpoint(endpoint: str) -> None:
    """Refuse what ZeroMQ would refuse later with less to say, and what is not safe.

    Raises:
        ValueError: it is not ``tcp://ADDRESS:PORT`` or ``ipc:///PATH``; says what to write instead.
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in {"tcp", "ipc"}:
        raise ValueError(f"{endpoint!r} is not an endpoint; write tcp://ADDRESS:PORT or ipc:///PATH")
    if scheme == "tcp":
        _check_tcp(endpoint, rest)
    else:
        _check_ipc(endpoint, rest)


def check_absolute(path: Path) -> None:
    """Refuse a directory that would be another one for a process that runs elsewhere.

    Raises:
        ValueError: the path is relative.
    """
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is relative; write an absolute path")


def check_runtime_dir(path: Path) -> None:
    """Refuse a runtime directory in which no socket could be made.

    Raises:
        ValueError: the path is relative, or leaves no room for the names of sockets.
    """
    check_absolute(path)
    longest = SOCKET_PATH_BYTES - SOCKET_NAME_BYTES
    length = len(str(path).encode())
    if length > longest:
        raise ValueError(
            f"the path has {length} bytes, and at most {longest} leave room for the sockets in it"
            f" (the kernel allows {SOCKET_PATH_BYTES} in all); choose a shorter one"
        )


def _check_tcp(endpoint: str, rest: str) -> None:
    address, separator, port = rest.rpartition(":")
    if not separator or not address or "/" in rest:
        raise ValueError(f"{endpoint!r} needs an address and a port, as in tcp://127.0.0.1:5555")
    if not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        raise ValueError(f"{endpoint!r} has no valid port; use 1 to {_MAX_PORT}, or 0 for any free one")
    if ":" in address and not (address.startswith("[") and address.endswith("]")):
        raise ValueError(f"{endpoint!r}: write an IPv6 address in brackets, as in tcp://[::1]:5555")
    bracketed = address.startswith("[")
    if address == "*" or bracketed or _is_ipv4(address):
        return
    if address == "localhost" or not _INTERFACE.fullmatch(address):
        raise ValueError(
            f"{endpoint!r}: names are not resolved where the daemon listens; write the address"
            " (127.0.0.1 for this host alone, 0.0.0.0 for every interface) or an interface such as eth0"
        )


def _is_ipv4(address: str) -> bool:
    octets = address.split(".")
    return len(octets) == _OCTETS and all(part.isascii() and part.isdigit() and int(part) <= 255 for part in octets)


def _check_ipc(endpoint: str, path: str) -> None:
    if path.startswith("@"):
        raise ValueError(
            f"{endpoint!r} is an abstract name, which every container that shares the network can open;"
            " write a path, as in ipc:///run/cpe/trainers.sock"
        )
    if not path.startswith("/"):
        raise ValueError(f"{endpoint!r} needs an absolute path, as in ipc:///run/cpe/trainers.sock")
    length = len(path.encode())
    if length > SOCKET_PATH_BYTES:
        raise ValueError(f"{endpoint!r}: the path has {length} bytes; a unix socket allows {SOCKET_PATH_BYTES}")

"""Why a tcp endpoint cannot be listened on, found out before the daemon does anything that takes long."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import Final

from cpe_daemon.errors import ConfigError, CpeError, ResourceError

_TCP: Final = "tcp://"
_NOT_NOW: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENODEV)
_MENDS: Final[Mapping[int, str]] = {
    errno.EADDRINUSE: "another process has it; stop that, or give ingest.listen another port",
    errno.EADDRNOTAVAIL: "no interface of this host has that address",
    errno.ENODEV: "this host has no such interface",
    errno.EACCES: "ports below 1024 are for root; give ingest.listen another one",
}


def check_address(endpoint: str) -> None:
    """Refuse an endpoint that could not be bound. Binds its address for a moment; what is no tcp address passes.

    Raises:
        ConfigError: it never can be.
        ResourceError: somebody has it now, or the host lacks the address.
    """
    host, _, port = endpoint.removeprefix(_TCP).rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not endpoint.startswith(_TCP) or not (host == "*" or ":" in host or host.replace(".", "").isdigit()):
        return  # a path, or an interface's name, which libzmq looks up
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as libzmq does
            probe.bind(("" if host == "*" else host, int(port)))
    except OSError as error:
        raise cannot_listen(endpoint, error.errno or 0, os.strerror(error.errno or 0)) from None


def cannot_listen(endpoint: str, number: int, why: str) -> CpeError:
    """Make the error for an endpoint that cannot be bound: a `ResourceError` if that may change, else a `ConfigError`.

    Args:
        endpoint: as it was given.
        number: the kernel's.
        why: its text.
    """
    kind = ResourceError if number in _NOT_NOW else ConfigError
    if not endpoint.startswith(_TCP):
        return kind(f"cannot listen on {endpoint}: {why}")
    mend = _MENDS.get(number, "choose another one")
    return kind(f"cannot listen on {endpoint} (ingest.listen): {why}: {mend}")

"""Where the daemon shows its metrics, its health and its state to whoever watches over it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

from pydantic import Field, ValidationInfo, field_validator

from cpe_daemon.config.section import Section

_MAX_PORT: Final = 65_535


class HttpConfig(Section):
    """The HTTP listener: /metrics for Prometheus, /healthz, /readyz and /status. It only tells, and takes no orders."""

    listen: str = Field(
        default="127.0.0.1:9845",
        description="ADDRESS:PORT; 0.0.0.0:9845 for every interface, [::]:9845 for IPv6 as well. Port 0 is any free "
        'one, "" is no listener. It tells whoever reaches it which models, engines and processes there are.',
    )
    tls_certificate: str = Field(
        default="",
        description='PEM file with the certificate, and its chain, for https; "": plain http. Read again when it '
        "changes.",
    )
    tls_key: str = Field(default="", description="PEM file with the certificate's private key.")

    @field_validator("listen")
    @classmethod
    def _usable_address(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @field_validator("tls_certificate", "tls_key")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and not Path(value).is_absolute():
            raise ValueError(f"{value!r} is relative; write an absolute path")
        return value

    @field_validator("tls_key")
    @classmethod
    def _both_files(cls, value: str, info: ValidationInfo) -> str:
        if bool(value) != bool(info.data.get("tls_certificate", value)):
            raise ValueError("https needs both http.tls_certificate and http.tls_key; set the other one as well")
        return value

    @property
    def address(self) -> tuple[str, int] | None:
        """Where to listen: an IP address and a port; None for nowhere."""
        return parse_address(self.listen) if self.listen else None

    @property
    def exposed(self) -> bool:
        """Whether others than this host's processes reach it, and anybody on their way reads along."""
        return self.address is not None and not self.tls_certificate and not is_loopback(self.address[0])


def parse_address(listen: str) -> tuple[str, int]:
    """Return the IP address, without brackets, and the port of ``ADDRESS:PORT``.

    Raises:
        ValueError: it is none; says what to write.
    """
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        raise ValueError(f"{listen!r} needs an address and a port, as in 127.0.0.1:9845")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        found = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise ValueError(
            f"{listen!r}: names are not resolved where the daemon listens; write the address"
            " (127.0.0.1 for this host alone, 0.0.0.0 for every interface)"
        ) from None
    if bracketed != (found.version == 6):
        raise ValueError(f"{listen!r}: write an IPv6 address, and no other, in brackets, as in [::1]:9845")
    return str(found), int(port)


def is_loopback(address: str) -> bool:
    """Whether only processes of this host reach an IP address."""
    return ipaddress.ip_address(address).is_loopback

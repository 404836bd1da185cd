"""Where the HTTP listener may listen, and what is said of where it may not."""

from __future__ import annotations

from typing import Any

import pytest

from cpe_daemon.config import Config, load_config
from cpe_daemon.errors import ConfigError


def http(**settings: Any) -> Config:
    return load_config(environ={}, overrides={f"http.{name}": value for name, value in settings.items()})


def test_listens_on_loopback_unless_told_otherwise() -> None:
    settings = http().http
    assert settings.address == ("127.0.0.1", 9845)
    assert not settings.exposed


@pytest.mark.parametrize(
    ("written", "address", "exposed"),
    [
        ("0.0.0.0:9845", ("0.0.0.0", 9845), True),
        ("127.0.0.2:0", ("127.0.0.2", 0), False),
        ("10.1.2.3:65535", ("10.1.2.3", 65535), True),
        ("[::]:9845", ("::", 9845), True),
        ("[::1]:9845", ("::1", 9845), False),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1), True),
        ("", None, False),
    ],
)
def test_address_is_read(written: str, address: tuple[str, int] | None, exposed: bool) -> None:
    settings = http(listen=written).http
    assert (settings.address, settings.exposed) == (address, exposed)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("9845", "needs an address and a port, as in 127.0.0.1:9845"),
        (":9845", "names are not resolved"),
        ("*:9845", "0.0.0.0 for every interface"),
        ("localhost:9845", "127.0.0.1 for this host alone"),
        ("127.0.0.1", "needs an address and a port"),
        ("127.0.0.1:", "needs an address and a port"),
        ("127.0.0.1:65536", "needs an address and a port"),
        ("127.0.0.1:-1", "needs an address and a port"),
        ("127.0.0.1:٣", "needs an address and a port"),
        ("::1:9845", "in brackets, as in [::1]:9845"),
        ("[127.0.0.1]:9845", "in brackets, as in [::1]:9845"),
        ("http://127.0.0.1:9845", "names are not resolved"),
        ("256.0.0.1:9845", "names are not resolved"),
    ],
)
def test_address_that_is_none_is_refused_with_the_mend(written: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        http(listen=written)
    assert "http.listen" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key"])
def test_https_needs_both_files(name: str) -> None:
    with pytest.raises(ConfigError, match=r"https needs both http\.tls_certificate and http\.tls_key"):
        http(**{name: "/etc/x.pem"})


def test_https_is_for_others_to_see_and_needs_no_warning() -> None:
    settings = http(listen="0.0.0.0:9845", tls_certificate="/etc/x.pem", tls_key="/etc/x.key").http
    assert not settings.exposed


def test_file_is_named_in_full() -> None:
    with pytest.raises(ConfigError, match=r"'x\.pem' is relative"):
        http(tls_certificate="x.pem", tls_key="/etc/x.key")

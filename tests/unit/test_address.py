"""Whether a tcp endpoint could be listened on."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest
import zmq

from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.links.address import cannot_listen, check_address


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "0.0.0.0"])
def test_address_that_somebody_has_is_refused(taken: int, host: str) -> None:
    with pytest.raises(
        ResourceError, match=r"\(ingest.listen\): Address already in use: another process has it; .* port"
    ):
        check_address(f"tcp://{host}:{taken}")


def test_address_that_the_host_lacks_is_refused() -> None:
    with pytest.raises(ResourceError, match="no interface of this host has that address"):
        check_address("tcp://192.0.2.1:5555")


def test_address_stays_free(taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        check_address(free)
        router.bind(free)


@pytest.mark.parametrize("endpoint", ["ipc:///none/x.sock", "tcp://eth7:5555", "tcp://127.0.0.1:0", "tcp://*:0"])
def test_what_is_no_matter_of_an_address_passes(endpoint: str) -> None:
    check_address(endpoint)


def test_port_for_root_is_never_to_be_had() -> None:
    error = cannot_listen("tcp://127.0.0.1:80", errno.EACCES, os.strerror(errno.EACCES))
    assert isinstance(error, ConfigError)
    assert "ports below 1024 are for root" in error.message


def test_path_has_no_mend_of_an_addresses() -> None:
    assert str(cannot_listen("ipc:///x", errno.EADDRINUSE, "taken")) == "cannot listen on ipc:///x: taken"

"""How a command talks to a daemon: the options that say to which, and questions that are answered in time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import click

from cpe_daemon.cli.settings import KEY, LOCAL_DAEMON, SERVER_KEY, credentials_for, front_endpoint
from cpe_daemon.errors import DeadlineError, PeerLostError, from_code

if TYPE_CHECKING:
    from cpe_daemon.links.keys import Credentials
    from cpe_daemon.wire.messages import Message

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound="Message")


@dataclass(frozen=True, slots=True)
class DaemonAddress:
    """Which daemon a command talks to, and with which keys if that is over tcp."""

    endpoint: str
    credentials: Credentials | None = None


def daemon_options_by(endpoint_option: str) -> Callable[[F], F]:
    """Give a command the options of `daemon_options`, with another name for the one that takes an endpoint."""

    def give(command: F) -> F:
        @click.option(endpoint_option, "to", metavar="ENDPOINT", help="Talk to the daemon at this endpoint.")
        @LOCAL_DAEMON
        @KEY
        @SERVER_KEY
        @functools.wraps(command)
        def with_daemon(
            *arguments: Any,
            to: str | None,
            runtime_dir: Path | None,
            key: Path | None,
            server_key: str | None,
            **options: Any,
        ) -> Any:
            endpoint = to or front_endpoint(runtime_dir)
            address = DaemonAddress(endpoint, credentials_for(endpoint, key, server_key))
            return command(*arguments, daemon=address, **options)

        return cast("F", with_daemon)

    return give


def daemon_options(command: F) -> F:
    """Give a command --to, --runtime-dir and keys, and with them the argument ``daemon``, a `DaemonAddress`."""
    return daemon_options_by("--to")(command)


def timeout_option(default: float, what: str) -> Callable[[F], F]:
    """Make an option --timeout of seconds."""
    return click.option(
        "--timeout",
        type=click.FloatRange(0.0, min_open=True),
        default=default,
        show_default=True,
        metavar="SECONDS",
        help=what,
    )


class Conversation:
    """A command's link to a daemon; a context. Belongs to one thread.

    Args:
        daemon: which one.

    Raises:
        PeerLostError: the endpoint's socket is no file here: no daemon has listened there.
        AccessError: this user may not connect there.
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, daemon: DaemonAddress) -> None:
        from cpe_daemon.links.dealer import Dealer
        from cpe_daemon.wire.messages import FrontReply

        self.endpoint = daemon.endpoint
        look_for_daemon(daemon.endpoint)
        self._dealer = Dealer(daemon.endpoint, FrontReply, daemon.credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dealer.close()

    def say(self, message: Message, timeout: float) -> None:
        """Send a message.

        Raises:
            PeerLostError: nobody took it for ``timeout`` seconds.
            AccessError: nobody will, because of the keys.
        """
        self._dealer.send(message, timeout=timeout)

    def hear(self, timeout: float) -> Message | None:
        """Return what the daemon says next; None if that is nothing for ``timeout`` seconds.

        Raises:
            CpeError: it refuses what was said; rebuilt from its code.
        """
        from cpe_daemon.wire.messages import ErrorReply

        received = self._dealer.receive(timeout)
        message = received[0] if received is not None else None
        if isinstance(message, ErrorReply):
            raise from_code(message.error.code, message.error.message)
        return message

    def ask(self, question: Message, answer: type[M], timeout: float, what: str) -> M:
        """Return the answer to a question. ``what`` the daemon shall do is for the error if it does not.

        Raises:
            PeerLostError: nobody is there.
            DeadlineError: somebody is, and did not answer in ``timeout`` seconds.
            CpeError: what the daemon answered instead.
        """
        deadline = time.monotonic() + timeout
        self.say(question, timeout)
        while (left := deadline - time.monotonic()) > 0:
            message = self.hear(left)
            if isinstance(message, answer):
                return message
        raise DeadlineError(f"the daemon at {self.endpoint} did not {what} within {timeout:g} s")

    def status(self, timeout: float) -> dict[str, Any]:
        """Return the daemon's state; raises as `ask` does."""
        from cpe_daemon.wire.messages import StatusReply, StatusRequest

        return self.ask(StatusRequest(), StatusReply, timeout, "send its status").status


def ask_status(daemon: DaemonAddress, timeout: float) -> dict[str, Any]:
    """Return the state of a daemon; raises as `Conversation` and its `ask` do."""
    with Conversation(daemon) as conversation:
        return conversation.status(timeout)


def look_for_daemon(endpoint: str) -> None:
    """Fail at once where no daemon ever listened or nobody is let in, rather than wait for that to change.

    Raises:
        PeerLostError: the endpoint's socket is no file here.
        AccessError: this user may not connect there.
    """
    from cpe_daemon.links.permission import check_permission

    check_permission(endpoint)
    path = endpoint.removeprefix("ipc://")
    if path != endpoint and not Path(path).exists():
        raise PeerLostError(f"no daemon listens at {endpoint}; is `cpe serve` running, and in this --runtime-dir?")

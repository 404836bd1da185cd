"""How a command fails: a line for a person to act on, a status for a script, a traceback on request."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any, Final

import click

from cpe_daemon.errors import (
    ConfigError,
    CpeError,
    DeadlineError,
    EngineError,
    MisuseError,
    PeerError,
    PublishError,
    ResourceError,
)

INTERNAL: Final = 1
INTERRUPTED: Final = 130

_STATUS: Final[tuple[tuple[type[CpeError], int], ...]] = (
    (ConfigError, 2),  # as click's own: the command line was wrong
    (MisuseError, 3),
    (DeadlineError, 5),
    (PeerError, 4),
    (ResourceError, 6),
    (EngineError, 7),
    (PublishError, 7),
)
"""The first class that fits counts."""

_DEBUG: Final = "cpe_daemon.debug"


class FailingGroup(click.Group):
    """A group whose commands may raise: every error ends here, as a line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the subcommands in the order in which they were added: as one meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click knows what to do with these
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:  # task boundary: the command is over, and this is how it says why
            ctx.exit(_report(error, debug=debugging(ctx)))


def _remember(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    envvar="CPE_DEBUG",
    expose_value=False,
    callback=_remember,
    help="Show tracebacks of errors.",
)
"""For `main` and every command alike: one notices only afterwards that one would have liked to say it."""


def debugging(ctx: click.Context) -> bool:
    """Whether --debug was given, at whichever place."""
    return bool(ctx.meta.get(_DEBUG))


def exit_status(error: Exception) -> int:
    """Return the documented exit status for ``error``."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), INTERNAL)


def _report(error: Exception, *, debug: bool) -> int:
    """Write ``error`` to standard error, and return the status to exit with."""
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    found = list(_leaves(error))
    for leaf in found:
        _write(leaf, debug=debug)
    return max((exit_status(leaf) for leaf in found), default=INTERNAL)


def _leaves(error: Exception) -> Iterator[Exception]:
    """Yield what a TaskGroup bundled, one by one."""
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _write(error: Exception, *, debug: bool) -> None:
    if isinstance(error, CpeError):
        first, *more = error.message.splitlines() or [type(error).__name__]
        code = error.code
    else:
        hint = "" if debug else "; --debug shows where"
        first, more, code = f"unexpected {type(error).__name__}: {error}{hint}", [], "internal"
    label = click.style("error:", fg="red", bold=True)
    click.echo("\n".join([f"{label} {first}  [{code}]", *more]), err=True)

"""``cpe doctor``: what would keep this host from serving, and the mend."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from cpe_daemon.cli.conversation import DaemonAddress, ask_status, timeout_option
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.settings import front_endpoint, load, settings_options
from cpe_daemon.errors import ConfigError, CpeError

if TYPE_CHECKING:
    from rich.table import Table

    from cpe_daemon.doctor import Answer, EngineUrl, Finding, Subject

_FAILED: Final = 1
_ASK_SECONDS: Final = 5.0
_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def _names() -> list[str]:
    from cpe_daemon.doctor import CHECKS

    return [check.name for check in CHECKS]


def _checked(_ctx: click.Context, _option: click.Parameter, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what names no check, naming those that there are."""
    names = _names() if chosen else []
    for name in chosen:
        if name not in names:
            raise click.BadParameter(f"there is no check {name!r}; there are {', '.join(names)}")
    return chosen


def _complete(_ctx: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    """Name the checks that begin like this, for a shell."""
    return [name for name in _names() if name.startswith(incomplete)]


@click.command("doctor", short_help="Find what would keep this host from serving, and the mend.")
@settings_options
@click.option(
    "--only",
    multiple=True,
    callback=_checked,
    shell_complete=_complete,
    metavar="NAME",
    help="Run this check. May be repeated.",
)
@click.option(
    "--engine",
    "engine_urls",
    multiple=True,
    metavar="[NAME=]URL",
    help="Ask this engine's server for its health, too: http://127.0.0.1:8000, or unix:///PATH. May be repeated.",
)
@timeout_option(60.0, "A check that takes longer has failed.")
@click.option("--strict", is_flag=True, help="Fail for warnings, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as described above.")
@debug_option
@click.pass_context
def doctor_command(
    ctx: click.Context,
    path: Path | None,
    assignments: tuple[str, ...],
    runtime_dir: Path | None,
    only: tuple[str, ...],
    engine_urls: tuple[str, ...],
    timeout: float,
    strict: bool,
    as_json: bool,
) -> None:
    """Examine this host, and its daemon if one runs: for each point ok, warn or fail, and the mend.

    Nothing is changed. Give it the settings that the daemon has or will have, and run it as the user that the daemon
    has or will have: what is enough depends on both. A point that does not apply here is skipped, with why.

    \b
    Checks, for --only:
      installation  config, runtime-dir, state-dir, keys, systemd
      host          kernel, memory, memlock, hugepages, files, numa
      gpus          gpus, pcie, peer-access, compute-mode, mig
      network       rdma, endpoints
      software      python, torch, zeromq, mooncake
      serving       daemon, engines, engine-urls

    \b
    Examples:
      cpe doctor --config /etc/cpe-daemon/config.yaml
      cpe doctor --only memory --set arena.size_bytes=512GiB
      cpe doctor --engine http://127.0.0.1:8000 --only engine-urls
      cpe doctor --json | jq '.[] | select(.verdict == "fail")'

    \b
    Keys of each object in the JSON list:
      name       of the check
      group      that it belongs to
      verdict    ok, warn (works, could be better), fail (does not work), skip (does not apply)
      found      what there is, and why that matters; of a skipped check: why
      mend       what to do; empty where there is nothing to do

    \b
    Exit status: 0 if nothing failed, 1 if something did (with --strict also for a warning).
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.doctor import Verdict, examine

    engines = [_engine(text) for text in engine_urls]
    subject = _subject(path, assignments, runtime_dir, engines, min(timeout, _ASK_SECONDS))
    with _progress() as waiting:
        findings = examine(subject, only=only, seconds=timeout, waiting=waiting)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)
    bad = {Verdict.FAIL, Verdict.WARN} if strict else {Verdict.FAIL}
    ctx.exit(_FAILED if any(finding.verdict in bad for finding in findings) else 0)


def _subject(
    path: Path | None,
    assignments: tuple[str, ...],
    runtime_dir: Path | None,
    engines: Sequence[EngineUrl],
    seconds: float,
) -> Subject:
    """Gather what is to be examined. Settings that are not valid are a finding, not the end."""
    from cpe_daemon.config import default_runtime_dir
    from cpe_daemon.doctor import LiveHost, Needs, Subject

    try:
        config = load(path, assignments, runtime_dir).config
    except ConfigError as error:
        needs, settings, directory = None, error.message, runtime_dir or default_runtime_dir()
    else:
        needs, directory = Needs.of(config), config.runtime_dir
        settings = f"{path} is valid" if path is not None else "the defaults, for no --config is given"
    return Subject(
        LiveHost(),
        runtime_dir=str(directory.absolute()),
        needs=needs,
        settings=settings,
        config_path=None if path is None else str(path.absolute()),
        ask=functools.partial(_ask, front_endpoint(directory), seconds),
        engines=engines,
    )


def _ask(endpoint: str, seconds: float) -> Answer:
    """Ask the daemon for its status."""
    from cpe_daemon.doctor import Answer

    started = time.monotonic()
    try:
        return Answer(ask_status(DaemonAddress(endpoint), seconds), seconds=time.monotonic() - started)
    except CpeError as error:
        return Answer(None, error.message, time.monotonic() - started)


def _engine(text: str) -> EngineUrl:
    """Read an engine's name and URL."""
    from cpe_daemon.doctor import EngineUrl

    name, separator, url = text.partition("=")
    if not separator or "://" in name:
        name, url = text.partition("://")[2].rstrip("/"), text
    if not url.startswith(("http://", "https://", "unix:///")):
        raise click.BadParameter(f"{text!r} is not [NAME=]http://HOST:PORT or unix:///PATH", param_hint="--engine")
    return EngineUrl(name, "as given", url)


@contextmanager
def _progress() -> Iterator[Callable[[list[str]], None]]:
    """Show what is still being looked at on standard error, if that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda names: None
        return
    with console.status("looking") as status:
        yield lambda names: status.update(f"looking at {', '.join(names) or 'nothing more'}")


def _show(findings: list[Finding]) -> None:
    """Print findings for a person, group by group, and what they come to."""
    from rich.console import Console
    from rich.text import Text

    from cpe_daemon.cli.tables import columns

    console = Console(file=sys.stdout, width=columns(sys.stdout), highlight=False, emoji=False)
    verdicts = [finding.verdict.value for finding in findings]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in _COLOURS if verdict in verdicts]
    with console.capture() as capture:
        for group in dict.fromkeys(finding.group for finding in findings):
            console.print(Text(group, style="bold"))
            console.print(_table([finding for finding in findings if finding.group == group]))
        console.print(Text(", ".join(counts), style="bold"))
    for line in capture.get().splitlines():
        click.echo(line.rstrip())  # tables fill their columns with blanks


def _table(findings: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for width in (6, 14, None):
        table.add_column(min_width=width, overflow="fold")
    for finding in findings:
        verdict = finding.verdict.value
        about = Text(_plain(finding.found), style="dim" if verdict == "skip" else "")
        if finding.mend:
            about.append(f"\nmend: {_plain(finding.mend)}", style="cyan")
        table.add_row(Text(f"  {verdict}", style=_COLOURS[verdict]), Text(finding.name), about)
    return table


def _plain(text: str) -> str:
    """Leave out whatever would steer a terminal: some of it was said by other processes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)

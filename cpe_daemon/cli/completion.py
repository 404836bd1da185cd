"""``cpe completion``: what a shell needs to complete our commands, and the names that a running daemon knows.

Somebody has pressed a key and waits: whatever goes wrong, or takes long, completes nothing and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import click

from cpe_daemon.cli.conversation import DaemonAddress, ask_status
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.settings import credentials_for, front_endpoint
from cpe_daemon.errors import MisuseError

Complete = Callable[[click.Context, click.Parameter, str], list[str]]

_ASK_SECONDS: Final = 0.5
_PUSHABLE: Final = ("staged", "live")


@click.command("completion", short_help="Make a shell complete these commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete the commands of cpe.

    \b
    Put it where your shell looks (mkdir -p makes the directory), and begin a new shell:
      bash:  cpe completion bash > ~/.local/share/bash-completion/completions/cpe
      zsh:   cpe completion zsh > ~/.zfunc/_cpe        (with fpath+=~/.zfunc before compinit)
      fish:  cpe completion fish > ~/.config/fish/completions/cpe.fish
    """  # noqa: D301 - click wants the \b itself
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    if completion is None:
        raise MisuseError(f"this release of click cannot complete for {shell}")
    click.echo(completion(ctx.find_root().command, {}, "cpe", "_CPE_COMPLETE").source_template % _words())


def _words() -> dict[str, str]:
    """What click's templates ask for. Its own ``source()`` starts a bash to look at its version first."""
    return {"complete_func": "_cpe_completion", "complete_var": "_CPE_COMPLETE", "prog_name": "cpe"}


# --- names -----------------------------------------------------------------------------------------------------------


def _completing(names: Callable[[click.Context], Iterable[str]]) -> Complete:
    """Make a callback of click's out of a function that names what there is."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        try:
            found = sorted(set(names(context)))
        except Exception:  # task boundary: a shell shows whatever a completion says, in the middle of a line
            return []
        return [name for name in found if name.startswith(incomplete)]

    return complete


def _status(context: click.Context) -> Mapping[str, Any]:
    """Ask the daemon that the command would talk to."""
    options = context.params
    endpoint = options.get("to") or front_endpoint(options.get("runtime_dir"))
    keys = credentials_for(endpoint, options.get("key"), options.get("server_key"))
    return ask_status(DaemonAddress(endpoint, keys), _ASK_SECONDS)


def _engines(context: click.Context) -> Iterable[str]:
    return (str(engine["engine"]) for engine in _status(context)["engines"])


def _models(context: click.Context) -> Iterable[str]:
    status = _status(context)
    return (str(entry["model"]) for entry in [*status["versions"], *status["engines"]] if entry["model"])


def _versions(context: click.Context) -> Iterable[str]:
    held = [version for version in _status(context)["versions"] if version["state"] in _PUSHABLE]
    models = [str(version["model"]) for version in held]
    return [*models, *(f"{version['model']}@{version['run']}#{version['number']}" for version in held)]


def _retained(context: click.Context) -> Iterable[Mapping[str, Any]]:
    return (version for version in _status(context)["versions"] if version["state"] == "retained")


def _retained_models(context: click.Context) -> Iterable[str]:
    retained = list(_retained(context))
    return [*(str(version["model"]) for version in retained), *(f"{v['model']}@{v['run']}" for v in retained)]


def _retained_numbers(context: click.Context) -> Iterable[str]:
    model = str(context.params.get("model") or next(iter(context.args), ""))  # before an option without a value: there
    return (
        str(version["number"])
        for version in _retained(context)
        if model in ("", version["model"], f"{version['model']}@{version['run']}")
    )


def _kinds(_context: click.Context) -> Iterable[str]:
    from importlib.metadata import entry_points

    from cpe_daemon.engines.drivers import GROUP

    return entry_points(group=GROUP).names


complete_engines: Final = _completing(_engines)
"""The engines that a daemon knows or expects."""

complete_models: Final = _completing(_models)
"""The models that a daemon knows."""

complete_versions: Final = _completing(_versions)
"""The versions that could be pushed, and their models."""

complete_retained_models: Final = _completing(_retained_models)
"""The models that could be rolled back, and their runs."""

complete_retained_numbers: Final = _completing(_retained_numbers)
"""The versions of the model that was named which could be rolled back to."""

complete_kinds: Final = _completing(_kinds)
"""The kinds of engines that have a plugin here."""

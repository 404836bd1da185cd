"""``cpe completion``: what a shell needs to complete our commands."""

from __future__ import annotations

import click

from cpe_daemon.cli.failures import debug_option
from cpe_daemon.errors import MisuseError


@click.command("completion", short_help="Make a shell complete these commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete the commands of cpe.

    \b
    Put it where your shell looks:
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

"""``cpe config``, and the options by which commands find their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from cpe_daemon.cli.failures import debug_option

if TYPE_CHECKING:
    from cpe_daemon.config import Loaded
    from cpe_daemon.links.keys import Credentials

F = TypeVar("F", bound=Callable[..., Any])

_CONFIG = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    envvar="CPE_CONFIG",
    metavar="FILE",
    help="Configuration file, in YAML.  [env: CPE_CONFIG]",
)
_SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one setting, over file and environment: --set device.slots=4. May be repeated.",
)
_RUNTIME_DIR = click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, readable=False),  # who may not enter it is told so, and how to be let in
    metavar="DIR",
    help="Directory of the daemon's sockets; the same as --set runtime_dir=DIR.",
)

LOCAL_DAEMON: Final = click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, readable=False),
    envvar="CPE_RUNTIME_DIR",
    metavar="DIR",
    help="Talk to the daemon that runs in this directory.  [env: CPE_RUNTIME_DIR]",
)


KEY: Final = click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="CPE_KEY",
    metavar="FILE",
    help="This side's secret key file, for tcp; see cpe keys.  [env: CPE_KEY]",
)
SERVER_KEY: Final = click.option(
    "--server-key",
    envvar="CPE_SERVER_KEY",
    metavar="KEY|FILE",
    shell_complete=lambda *_: [CompletionItem("", type="file")],
    help="The public key by which the daemon is recognised.  [env: CPE_SERVER_KEY]",
)


def settings_options(command: F) -> F:
    """Give a command --config, --set and --runtime-dir."""
    decorated: F = _CONFIG(_SET(_RUNTIME_DIR(command)))
    return decorated


def load(path: Path | None, assignments: tuple[str, ...], runtime_dir: Path | None) -> Loaded:
    """Load the settings that the options ask for.

    Raises:
        ConfigError: lists every problem.
    """
    from cpe_daemon.config import load_with_origins

    overrides: dict[str, object] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key.strip():
            raise click.BadParameter(f"{assignment!r} is not KEY=VALUE", param_hint="--set")
        overrides[key.strip()] = value.strip()
    if runtime_dir is not None:
        overrides["runtime_dir"] = str(runtime_dir.absolute())
    return load_with_origins(path, overrides=overrides)


def front_endpoint(runtime_dir: Path | None) -> str:
    """Return the endpoint of the daemon that runs in a directory; None: where one runs by default."""
    from cpe_daemon.config import FRONT_SOCKET, default_runtime_dir

    return f"ipc://{(runtime_dir or default_runtime_dir()).absolute() / FRONT_SOCKET}"


def credentials_for(endpoint: str, key: Path | None, server_key: str | None) -> Credentials | None:
    """Return the keys that a connection to ``endpoint`` takes; None where it takes none.

    Raises:
        ConfigError: they cannot be used.
    """
    if not endpoint.startswith("tcp://") or (key is None and server_key is None):
        return None
    from cpe_daemon.links.keys import credentials

    return credentials(key, server_key, endpoint)


@click.command("config", short_help="Check and show the configuration.")
@settings_options
@click.option("--default", "show_default", is_flag=True, help="Print every setting's default, explained.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes, durations in seconds.")
@debug_option
def config_command(
    path: Path | None,
    assignments: tuple[str, ...],
    runtime_dir: Path | None,
    show_default: bool,
    as_json: bool,
) -> None:
    """Check the configuration and print what is in effect, with the place that each setting comes from.

    \b
    Examples:
      cpe config --default > cpe.yaml
      cpe config --config cpe.yaml
      CPE_DEVICE__SLOTS=4 cpe config --set arena.size_bytes=64GiB
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.config import annotated_default, effective

    if show_default:
        click.echo(annotated_default(), nl=False)
        return
    loaded = load(path, assignments, runtime_dir)
    click.echo(loaded.config.model_dump_json(indent=2) if as_json else effective(loaded), nl=as_json)

"""``cpe keys``: make key pairs, and say which may connect to this node's daemon over tcp."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from cpe_daemon.cli.failures import FailingGroup, debug_option
from cpe_daemon.core.roles import Role
from cpe_daemon.errors import CpeError, MisuseError

if TYPE_CHECKING:
    from cpe_daemon.links.allowed import Client

F = TypeVar("F", bound=Callable[..., Any])

_DIRECTORY_MODE: Final = 0o750


_KEYS_DIR: Final = "security.keys_dir of the configuration"


def _directory_options(by_default: str = _KEYS_DIR) -> Callable[[F], F]:
    """Give a command --dir and --config, which say where the keys are."""
    directory = click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help=f"Directory of the keys; by default {by_default}.",
    )
    config = click.option(
        "--config",
        "config",
        type=click.Path(path_type=Path),
        envvar="CPE_CONFIG",
        metavar="FILE",
        help="Configuration file of the daemon whose keys these are.  [env: CPE_CONFIG]",
    )

    def give(command: F) -> F:
        decorated: F = directory(config(debug_option(command)))
        return decorated

    return give


def _names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of allowed keys."""
    from cpe_daemon.links.allowed import read_allowed

    try:
        clients = read_allowed(_allowed_file(ctx.params.get("directory"), ctx.params.get("config"))).values()
    except (CpeError, click.ClickException):
        return []
    found = [client for client in clients if client.name.startswith(incomplete)]
    return [CompletionItem(client.name, help=", ".join(sorted(client.roles))) for client in found]


@click.group("keys", cls=FailingGroup, short_help="Make keys, and allow or revoke them.")
@debug_option
def keys_command() -> None:
    """Say who may connect to this node's daemon over tcp. On the node itself no key is needed: files' modes decide.

    Everybody has a key pair, the daemon too. The secret half stays where it was made; the public half is shown
    around. The daemon lets in whose public key is allowed, encrypts everything, and takes from each what its roles
    permit: trainer (publishes weights), operator (status, pushes, engines), peer (another node's daemon).

    \b
    On the node, once:
      cpe keys new --daemon              then set ingest.listen, and start the daemon
    Where a trainer runs (both halves go to the directory where one is):
      cpe keys new run-7
    On the node, with a copy of the trainer's public key run-7.key:
      cpe keys allow run-7.key --role trainer
    Where the trainer runs, with a copy of the daemon's public key daemon.key:
      cpe publish ... --to tcp://10.0.0.7:5555 --key run-7.key_secret --server-key daemon.key

    What is allowed or revoked counts within a heartbeat, without a restart. Why keys are needed and what they do not
    protect: docs/SECURITY.md.
    """  # noqa: D301 - click wants the \b itself


@keys_command.command("new", short_help="Make a key pair.")
@click.argument("name", required=False)
@click.option("--daemon", "of_daemon", is_flag=True, help="The pair of this node's daemon; it is called daemon.")
@_directory_options(f"the one where you are, and with --daemon {_KEYS_DIR}")
def new_command(name: str | None, of_daemon: bool, directory: Path | None, config: Path | None) -> None:
    """Make a key pair called NAME, and say what to do with it.

    Writes NAME.key_secret, which only its owner may read, and NAME.key, which may be shown to anybody: into the
    directory where you are, and the daemon's pair to where the daemon looks for it. A pair is never overwritten.

    \b
    Examples:
      cpe keys new --daemon
      cpe keys new run-7
      cpe keys new alice --dir ~/keys
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.links.keys import DAEMON_NAME, new_pair, write_pair

    if of_daemon == (name is not None):
        raise click.UsageError("give either a NAME or --daemon")
    name = DAEMON_NAME if of_daemon else _checked_name(name or "")
    if name == DAEMON_NAME and not of_daemon:
        raise click.BadParameter("that is the daemon's own name; say --daemon to make its pair", param_hint="NAME")
    where = _keys_dir(directory, config) if of_daemon else (directory or Path()).absolute()
    _make(where)
    pair = new_pair()
    secret, public = write_pair(where, name, pair)
    click.echo(f"public key  {pair.public}\n  in file   {public}\nsecret key\n  in file   {secret}")
    click.echo(_next_steps_of_daemon(where, public) if of_daemon else _next_steps(name, secret, public), err=True)


@keys_command.command("allow", short_help="Let a key in.")
@click.argument("key", metavar="KEY|FILE", shell_complete=lambda *_: [CompletionItem("", type="file")])
@click.option(
    "--role",
    "roles",
    type=click.Choice([role.value for role in Role]),
    multiple=True,
    required=True,
    help="What its holder may do. May be repeated.",
)
@click.option("--name", help="What to call it; by default, the file's name.")
@_directory_options()
def allow_command(
    key: str, roles: tuple[str, ...], name: str | None, directory: Path | None, config: Path | None
) -> None:
    """Let the holder of a public key connect. KEY|FILE is the key itself, or the .key file with it.

    A key that is allowed already gets these roles instead of those that it had.

    \b
    Examples:
      cpe keys allow run-7.key --role trainer
      cpe keys allow alice.key --role operator --role trainer
      cpe keys allow 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7' --name bob --role operator
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.links.allowed import Client, allow
    from cpe_daemon.links.keys import PUBLIC_SUFFIX, SECRET_SUFFIX, public_key

    public = public_key(key)
    if name is None and not Path(key).is_file():
        raise click.UsageError("give the key a --name")
    file = _allowed_file(directory, config)
    _make(file.parent)
    if Path(key).name.endswith(SECRET_SUFFIX):
        click.echo(
            f"note: {key} holds a secret, which should stay with its owner; the {PUBLIC_SUFFIX} file is enough here",
            err=True,
        )
    name = _checked_name(name or Path(key).name.removesuffix(SECRET_SUFFIX).removesuffix(".key"))
    client = Client(name, public, frozenset(map(Role, roles)))
    before = allow(file, client)
    said = "is allowed" if before is None else "is as it was" if before == client else "has other roles now"
    click.echo(f"{client.name} {said}: {_roles(client)}")


@keys_command.command("revoke", short_help="Let a key in no more.")
@click.argument("key", metavar="NAME|KEY", shell_complete=_names)
@_directory_options()
def revoke_command(key: str, directory: Path | None, config: Path | None) -> None:
    """Let a key in no more, by its name or by the public key itself.

    A running daemon refuses its messages within a heartbeat, on connections that exist too, and gives up what its
    trainers have under way. What they have published stays.

    \b
    Example:
      cpe keys revoke run-7
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.links.allowed import revoke

    client = revoke(_allowed_file(directory, config), key)
    click.echo(f"{client.name} is revoked; it was {_roles(client)}")


@keys_command.command("list", short_help="Show the daemon's key, and which are allowed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: daemon, allowed: [name, roles, key].")
@_directory_options()
def list_command(as_json: bool, directory: Path | None, config: Path | None) -> None:
    """Show the daemon's public key, and the keys that may connect.

    \b
    Examples:
      cpe keys list
      cpe keys list --json | jq -r '.allowed[] | select(.roles | index("trainer")) | .name'
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.links.allowed import read_allowed
    from cpe_daemon.links.keys import DAEMON_NAME, PUBLIC_SUFFIX, load_public

    file = _allowed_file(directory, config)
    own_file = file.with_name(f"{DAEMON_NAME}{PUBLIC_SUFFIX}")
    own = load_public(own_file) if own_file.exists() else None
    clients = sorted(read_allowed(file).values(), key=lambda client: client.name)
    if as_json:
        allowed = [{"name": c.name, "roles": sorted(c.roles), "key": c.public} for c in clients]
        click.echo(json.dumps({"daemon": own, "allowed": allowed}, indent=2))
        return
    missing = f"has no pair in {file.parent}; cpe keys new --daemon --dir {shlex.quote(str(file.parent))} makes one"
    click.echo(f"daemon  {own or missing}")
    if not clients:
        click.echo(f"no key is allowed in {file}")
    width = max((len(client.name) for client in clients), default=0)
    roles_width = max((len(_roles(client)) for client in clients), default=0)
    for client in clients:
        click.echo(f"{client.name:<{width}}  {_roles(client):<{roles_width}}  {client.public}")


def _allowed_file(directory: Path | None, config: Path | None) -> Path:
    from cpe_daemon.links.allowed import ALLOWED

    return _keys_dir(directory, config) / ALLOWED


def _keys_dir(directory: Path | None, config: Path | None) -> Path:
    if directory is not None:
        return directory.absolute()
    from cpe_daemon.cli.settings import load

    return load(config, (), None).config.security.keys_dir


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise MisuseError(
            f"cannot make {directory}: {error.strerror or error}; give a directory of your own with --dir"
        ) from None


def _checked_name(name: str) -> str:
    from cpe_daemon.links.keys import NAME

    if not NAME.fullmatch(name):
        raise MisuseError(f"{name!r} is no name for a key: letters, digits and . _ @ - only, at most 64")
    return name


def _roles(client: Client) -> str:
    return ", ".join(sorted(client.roles))


def _next_steps_of_daemon(directory: Path, public: Path) -> str:
    return f"""
Next:
  - the daemon's user has to own the directory and what is in it:
      chown -R cpe: {shlex.quote(str(directory))}          (under the systemd unit; else whom it runs as)
  - say where to listen:      ingest.listen: ["tcp://0.0.0.0:5555"]
  - let a client in:          cpe keys allow CLIENT.key --role trainer --dir {shlex.quote(str(directory))}
  - give clients {public}: they recognise the daemon by it"""


def _next_steps(name: str, secret: Path, public: Path) -> str:
    return f"""
Next:
  - on each daemon's node, with a copy of {public}:
      cpe keys allow {public.name} --name {name} --role trainer       (operator: for `cpe status` and other commands)
  - here, with a copy of the daemon's public key, which is daemon.key there:
      export CPE_KEY={shlex.quote(str(secret))} CPE_SERVER_KEY=daemon.key
      cpe publish DIR --model MODEL --version 1 --to tcp://NODE:PORT"""

"""``cpe keys``: what it writes, what it shows, and how it refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from cpe_daemon.cli import main
from cpe_daemon.cli.keys import keys_command
from cpe_daemon.core.roles import Role
from cpe_daemon.links.allowed import Client, read_allowed
from cpe_daemon.links.keys import load_pair, load_public, new_pair


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


def cpe(*arguments: str | Path, **environ: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environ)


def keys(*arguments: str | Path, **environ: str) -> Result:
    return cpe("keys", *arguments, **environ)


def completed(*words: str | Path, incomplete: str = "") -> list[str]:
    shell = ShellComplete(main, {}, "cpe", "_CPE_COMPLETE")
    return [item.value for item in shell.get_completions(["keys", *map(str, words)], incomplete)]


def test_new_makes_a_pair_and_says_what_is_next(tmp_path: Path) -> None:
    made = keys("new", "run-7", "--dir", tmp_path / "keys")
    assert made.exit_code == 0
    secret, public = tmp_path / "keys/run-7.key_secret", tmp_path / "keys/run-7.key"
    pair = load_pair(secret)
    assert pair.public == load_public(public)
    assert (stat.S_IMODE(secret.stat().st_mode), stat.S_IMODE(secret.parent.stat().st_mode)) == (0o600, 0o750)
    assert pair.public in made.stdout
    assert pair.secret not in made.output
    for said in ("cpe keys allow run-7.key --name run-7 --role trainer", f"CPE_KEY={secret}", "cpe publish DIR"):
        assert said in made.stderr


def test_clients_pair_is_made_where_one_is_and_can_be_allowed_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the documents say: the pair of the daemon goes to where the daemon looks, a client's to where one stands."""
    monkeypatch.chdir(tmp_path)
    environ = {"CPE_SECURITY__KEYS_DIR": str(tmp_path / "configured")}
    assert keys("new", "--daemon", **environ).exit_code == 0
    assert keys("new", "run-7", **environ).exit_code == 0
    assert (tmp_path / "configured/daemon.key").exists()
    allowed = keys("allow", "run-7.key", "--role", "trainer", **environ)
    assert (allowed.exit_code, allowed.stderr) == (0, "")
    (client,) = read_allowed(tmp_path / "configured/allowed").values()
    assert client.public == load_pair(tmp_path / "run-7.key_secret").public


def test_secret_half_is_not_taken_without_a_word(tmp_path: Path) -> None:
    keys("new", "bob", "--dir", tmp_path)
    allowed = keys("allow", tmp_path / "bob.key_secret", "--role", "trainer", "--dir", tmp_path)
    assert allowed.stdout == "bob is allowed: trainer\n"
    assert "bob.key_secret holds a secret, which should stay with its owner" in allowed.stderr


def test_new_pair_of_the_daemon(tmp_path: Path) -> None:
    made = keys("new", "--daemon", "--dir", tmp_path)
    assert made.exit_code == 0
    assert load_pair(tmp_path / "daemon.key_secret").public in made.stdout
    assert "ingest.listen" in made.stderr
    again = keys("new", "--daemon", "--dir", tmp_path)
    assert again.exit_code == 2
    assert "daemon.key_secret is there already; choose another name or directory" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "either a NAME or --daemon"),
        (["x", "--daemon"], 2, "either a NAME or --daemon"),
        (["daemon"], 2, "say --daemon"),
        (["../x"], 3, "no name for a key"),
        (["x" * 65], 3, "no name for a key"),
    ],
)
def test_new_refuses_odd_names(arguments: list[str], status: int, said: str, tmp_path: Path) -> None:
    result = keys("new", *arguments, "--dir", tmp_path)
    assert result.exit_code == status
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_directory_comes_from_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "cpe.yaml"
    config.write_text(f"security:\n  keys_dir: {tmp_path}/configured\n")
    assert keys("new", "--daemon", CPE_CONFIG=str(config)).exit_code == 0
    assert keys("new", "--daemon", "--config", config).exit_code == 2, "it is there already"
    assert keys("new", "--daemon", CPE_SECURITY__KEYS_DIR=f"{tmp_path}/environment").exit_code == 0
    assert (tmp_path / "configured/daemon.key").exists()
    assert (tmp_path / "environment/daemon.key").exists()


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = keys("new", "a", "--dir", tmp_path / "file/keys")
    assert result.exit_code == 3
    assert "--dir" in result.stderr


def test_allow_takes_a_file_and_a_key(tmp_path: Path) -> None:
    keys("new", "run-7", "--dir", tmp_path / "theirs")
    allowed = keys("allow", tmp_path / "theirs/run-7.key", "--role", "trainer", "--dir", tmp_path / "mine")
    assert allowed.output == "run-7 is allowed: trainer\n"
    public = new_pair().public
    more = keys("allow", "--role", "operator", "--role", "trainer", "--name", "bob", "--dir", tmp_path / "mine", public)
    assert more.output == "bob is allowed: operator, trainer\n"
    assert set(read_allowed(tmp_path / "mine/allowed").values()) == {
        Client("run-7", load_public(tmp_path / "theirs/run-7.key"), frozenset({Role.TRAINER})),
        Client("bob", public, frozenset({Role.TRAINER, Role.OPERATOR})),
    }


def test_allow_again_changes_roles(tmp_path: Path) -> None:
    public = new_pair().public
    allow = ("allow", public, "--name", "bob", "--dir", tmp_path)
    assert "is allowed" in keys(*allow, "--role", "trainer").output
    assert "has other roles now: operator" in keys(*allow, "--role", "operator").output
    assert "is as it was" in keys(*allow, "--role", "operator").output


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nonsense", "--name", "x", "--role", "trainer"], 2, "neither a file nor a public key"),
        (["KEY", "--role", "trainer"], 2, "--name"),
        (["KEY", "--name", "x"], 2, "--role"),
        (["KEY", "--name", "x", "--role", "king"], 2, "'king' is not one of 'trainer', 'operator', 'peer'"),
        (["KEY", "--name", "a b", "--role", "trainer"], 3, "no name for a key"),
    ],
)
def test_allow_refuses(arguments: list[str], status: int, said: str, tmp_path: Path) -> None:
    public = new_pair().public
    result = keys("allow", *(public if word == "KEY" else word for word in arguments), "--dir", tmp_path)
    assert result.exit_code == status
    assert said in result.stderr
    assert not (tmp_path / "allowed").exists()


def test_revoke_takes_a_name_and_a_key(tmp_path: Path) -> None:
    public = new_pair().public
    for _ in range(2):
        keys("allow", public, "--name", "bob", "--role", "trainer", "--dir", tmp_path)
        assert keys("revoke", "bob", "--dir", tmp_path).output == "bob is revoked; it was trainer\n"
        keys("allow", public, "--name", "bob", "--role", "trainer", "--dir", tmp_path)
        assert keys("revoke", "--dir", tmp_path, public).exit_code == 0
    assert not read_allowed(tmp_path / "allowed")
    assert keys("revoke", "bob", "--dir", tmp_path).exit_code == 3


def test_list_shows_everything(tmp_path: Path) -> None:
    empty = keys("list", "--dir", tmp_path)
    assert empty.exit_code == 0
    assert f"cpe keys new --daemon --dir {tmp_path} makes one" in empty.output
    assert "no key is allowed" in empty.output
    keys("new", "--daemon", "--dir", tmp_path)
    own, public = load_public(tmp_path / "daemon.key"), new_pair().public
    keys("allow", public, "--name", "bob", "--role", "trainer", "--role", "operator", "--dir", tmp_path)
    shown = keys("list", "--dir", tmp_path).output
    assert own in shown
    assert f"bob  operator, trainer  {public}" in shown
    assert json.loads(keys("list", "--json", "--dir", tmp_path).output) == {
        "daemon": own,
        "allowed": [{"name": "bob", "roles": ["operator", "trainer"], "key": public}],
    }


def test_broken_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text("garbage\n")
    (tmp_path / "allowed").chmod(0o600)
    for command in (("list",), ("revoke", "bob")):
        result = keys(*command, "--dir", tmp_path)
        assert result.exit_code == 2
        assert f"{tmp_path}/allowed:1: has 1 fields" in result.stderr


def test_names_and_roles_are_completed(tmp_path: Path) -> None:
    for name in ("bob", "bert", "anne"):
        keys("allow", new_pair().public, "--name", name, "--role", "trainer", "--dir", tmp_path)
    assert completed("revoke", "--dir", tmp_path, incomplete="b") == ["bob", "bert"]
    assert completed("allow", "x.key", "--role", incomplete="") == ["trainer", "operator", "peer"]
    assert completed("revoke", "--dir", tmp_path / "none") == []
    assert completed(incomplete="") == ["new", "allow", "revoke", "list"]


@pytest.mark.parametrize("name", list(keys_command.commands))
def test_every_command_explains_itself(name: str) -> None:
    shown = keys(name, "--help")
    assert shown.exit_code == 0
    assert "Example" in shown.output
    assert "\b" not in shown.output


@pytest.mark.parametrize("command", [("status",), ("publish", ".", "--model", "m", "--version", "1")])
@pytest.mark.parametrize(
    ("keys_given", "said"),
    [
        (("--key", "none.key_secret"), "but not the daemon's public key"),
        (("--server-key", "none"), "but no key of this side's own"),
        (("--key", "none.key_secret", "--server-key", "x"), "none.key_secret cannot be read"),
    ],
)
def test_clients_keys_are_checked_before_anything_is_sent(
    command: tuple[str, ...], keys_given: tuple[str, ...], said: str
) -> None:
    result = cpe(*command, "--to", "tcp://127.0.0.1:9", *keys_given)
    assert result.exit_code == 2
    assert said in result.stderr

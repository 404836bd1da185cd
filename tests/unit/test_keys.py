"""Key files and the list of allowed keys: what is written, what is refused, and how it is said."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.auth import create_certificates
from zmq.utils import z85

from cpe_daemon.core.roles import Role
from cpe_daemon.errors import BusyError, ConfigError, MisuseError
from cpe_daemon.links.allowed import AllowedFile, Client, allow, parse_allowed, read_allowed, revoke
from cpe_daemon.links.identity import is_keyed, key_prefix, new_routing_id, prefix_of
from cpe_daemon.links.keys import (
    Credentials,
    KeyPair,
    credentials,
    is_key,
    load_pair,
    load_public,
    new_pair,
    public_key,
    raw_key,
    server_key_for,
    write_new,
    write_pair,
)

ANNE, BOB = (new_pair().public for _ in range(2))
TRAINER, BOTH = frozenset({Role.TRAINER}), frozenset({Role.TRAINER, Role.OPERATOR})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- pairs ---------------------------------------------------------------------------------------


def test_pair_is_read_as_it_was_written(tmp_path: Path) -> None:
    pair = new_pair()
    secret, public = write_pair(tmp_path, "run-7", pair)
    assert (secret.name, public.name) == ("run-7.key_secret", "run-7.key")
    assert load_pair(secret) == pair
    assert load_public(public) == load_public(secret) == pair.public
    assert (mode(secret), mode(public)) == (0o600, 0o644)


def test_pair_of_zeromqs_own_tools_is_read(tmp_path: Path) -> None:
    public, secret = (Path(path) for path in create_certificates(tmp_path, "theirs"))
    secret.chmod(0o600)
    assert load_pair(secret).public == load_public(public)


def test_secret_is_never_shown() -> None:
    pair = new_pair()
    assert pair.secret not in repr(pair)
    assert pair.secret not in repr(Credentials(pair, ANNE))


def test_secret_is_private_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = os.open

    def watched(path: Path, *arguments: int) -> int:
        fd = real(path, *arguments)
        seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return fd

    before = os.umask(0)
    try:
        monkeypatch.setattr("cpe_daemon.links.keys.os.open", watched)
        write_pair(tmp_path, "x", new_pair())
    finally:
        os.umask(before)
    assert seen == [0o600, 0o644]


@pytest.mark.parametrize("there", ["x.key", "x.key_secret"])
def test_pair_is_never_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(ConfigError, match=f"{there} is there already"):
        write_pair(tmp_path, "x", new_pair())
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


def test_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "x.key_secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="there already"):
        write_pair(tmp_path, "x", new_pair())
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o644, 0o660, 0o602])
def test_secret_that_others_could_read_is_refused(bits: int, tmp_path: Path) -> None:
    secret, _ = write_pair(tmp_path, "x", new_pair())
    secret.chmod(bits)
    with pytest.raises(ConfigError, match=rf"mode {bits:04o}\); chmod 600 .*x.key_secret"):
        load_pair(secret)


def test_public_file_where_the_secret_one_is_meant_says_so(tmp_path: Path) -> None:
    _, public = write_pair(tmp_path, "x", new_pair())
    with pytest.raises(ConfigError, match=r"holds no secret key; give x\.key_secret"):
        load_pair(public)


def test_secret_of_another_pair_is_refused(tmp_path: Path) -> None:
    secret, _ = write_pair(tmp_path, "x", KeyPair(new_pair().public, new_pair().secret))
    with pytest.raises(ConfigError, match="does not belong to its public key"):
        load_pair(secret)


@pytest.mark.parametrize("text", ["", "hello", 'curve\n    public-key = "short"\n', "public-key\n", "\xff\xfe"])
def test_what_is_no_key_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.key_secret"
    write_new(path, text, 0o600)
    for read in (load_pair, load_public):
        with pytest.raises(ConfigError, match=r"x.key_secret"):
            read(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.key_secret cannot be read: No such file"):
        load_pair(tmp_path / "none.key_secret")


def test_public_key_is_taken_as_text_and_as_file(tmp_path: Path) -> None:
    _, public = write_pair(tmp_path, "x", KeyPair(ANNE, new_pair().secret))
    assert public_key(ANNE) == public_key(public) == public_key(str(public)) == ANNE
    with pytest.raises(ConfigError, match="neither a file nor a public key"):
        public_key("nonsense")


def test_new_keys_can_be_typed_as_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([(b"-" + b"a" * 39, b"s" * 40), (b"a" * 40, b"s" * 40)])
    monkeypatch.setattr(zmq, "curve_keypair", lambda: next(made))
    assert new_pair().public == "a" * 40


def test_pyzmq_without_curve_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret, _ = write_pair(tmp_path, "x", new_pair())
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    for attempt in (new_pair, lambda: load_pair(secret)):
        with pytest.raises(ConfigError, match="built without CURVE"):
            attempt()


@given(st.binary(min_size=32, max_size=32))
def test_every_key_has_one_text(raw: bytes) -> None:
    text = z85.encode(raw).decode()
    assert is_key(text)
    assert raw_key(text) == raw


@pytest.mark.parametrize("text", ["", "a" * 39, "a" * 41, "#" * 40, "ä" * 40, "a" * 39 + " ", "~" * 40])
def test_what_is_no_key_is_told_apart(text: str) -> None:
    assert not is_key(text)


# --- credentials ---------------------------------------------------------------------------------


def test_credentials_are_for_tcp_only() -> None:
    pair = new_pair()
    assert credentials(pair, ANNE, "ipc:///run/x.sock") is None
    assert credentials(None, None, "tcp://h:1") is None
    assert credentials(pair, ANNE, "tcp://h:1") == Credentials(pair, ANNE)


def test_one_key_without_the_other_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tcp://h:1, but not the daemon's public key"):
        credentials(new_pair(), None, "tcp://h:1")
    with pytest.raises(ConfigError, match=r"tcp://h:1, but no key of this side's own"):
        credentials(None, ANNE, "tcp://h:1")


def test_each_daemon_may_have_its_own_key() -> None:
    keys = {"tcp://a:1": ANNE, "tcp://b:1": BOB}
    assert server_key_for("tcp://b:1", keys) == BOB
    assert server_key_for("tcp://c:1", keys) is None
    assert server_key_for("tcp://c:1", ANNE) == ANNE


# --- routing ids ---------------------------------------------------------------------------------


def test_routing_id_belongs_to_its_key() -> None:
    mine = new_routing_id(ANNE)
    assert is_keyed(mine)
    assert key_prefix(mine) == prefix_of(ANNE) != prefix_of(BOB)
    assert new_routing_id(ANNE) != mine
    assert not is_keyed(new_routing_id())


# --- the list ------------------------------------------------------------------------------------


def test_list_is_read() -> None:
    text = f"# a comment\n\n  trainer   {ANNE}  anne\noperator,trainer\t{BOB} bob\n   # trainer {ANNE} eve\n"
    assert parse_allowed(text, "F") == {ANNE: Client("anne", ANNE, TRAINER), BOB: Client("bob", BOB, BOTH)}
    assert parse_allowed("", "F") == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"trainer {ANNE}", "F:2: has 2 fields"),
        (f"trainer {ANNE} anne b", "F:2: has 4 fields"),
        (f"trainers {ANNE} anne", "F:2: 'trainers' is no role; there are trainer, operator, peer"),
        (f"trainer, {ANNE} anne", "F:2: '' is no role"),
        (f"trainer {ANNE[:-1]} anne", "F:2: .* is no public key"),
        (f"trainer {'#' * 40} anne", "F:2: .* is no public key"),
        (f"trainer {ANNE} ../anne", "F:2: '../anne' is no name"),
        (f"trainer {ANNE} {'a' * 65}", "F:2: .* is no name"),
        (f"trainer {ANNE} bob", r"F:2: another key is called bob \(line 1\)"),
        (f"trainer {BOB} anne", "F:2: the key of bob again"),
    ],
)
def test_mistake_in_the_list_is_named_with_its_line(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_allowed(f"operator {BOB} bob\n{line}\n", "F")


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_allowed("x\ny\n", "F")
    assert [line.strip()[:4] for line in str(caught.value).splitlines()] == ["F:1:", "F:2:"]


def test_list_is_edited_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    path.write_text(f"# ours\noperator {BOB} bob   \n# trainer {ANNE} anne\n\n# the end\n")
    path.chmod(0o640)
    assert allow(path, Client("anne", ANNE, TRAINER)) is None
    assert allow(path, Client("anne", ANNE, BOTH)) == Client("anne", ANNE, TRAINER)
    assert allow(path, Client("anne", ANNE, BOTH)) == Client("anne", ANNE, BOTH)
    assert read_allowed(path)[ANNE].roles == BOTH
    assert revoke(path, "bob").public == BOB
    assert revoke(path, ANNE).name == "anne"
    assert path.read_text() == f"# ours\n# trainer {ANNE} anne\n\n# the end\n"
    assert mode(path) == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["allowed"]


def test_list_is_made_when_the_first_key_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    assert read_allowed(path) == {}
    allow(path, Client("anne", ANNE, TRAINER))
    assert mode(path) == 0o640
    assert list(read_allowed(path)) == [ANNE]


def test_name_and_key_of_others_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    allow(path, Client("anne", ANNE, TRAINER))
    before = path.read_text()
    with pytest.raises(MisuseError, match="another key is called anne"):
        allow(path, Client("anne", BOB, TRAINER))
    with pytest.raises(MisuseError, match="allowed already, as anne"):
        allow(path, Client("bob", ANNE, TRAINER))
    with pytest.raises(MisuseError, match=r"no key .bob. is allowed in .*; there are: anne"):
        revoke(path, "bob")
    assert path.read_text() == before


def test_broken_list_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    write_new(path, f"trainer {ANNE} anne\ngarbage\n", 0o640)
    with pytest.raises(ConfigError, match="allowed:2:"):
        revoke(path, "anne")
    assert "garbage" in path.read_text()


def test_list_that_is_a_link_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "allowed"
    write_new(real, "", 0o640)
    link.symlink_to(real)
    allow(link, Client("anne", ANNE, TRAINER))
    assert link.is_symlink()
    assert list(read_allowed(real)) == [ANNE]


def test_list_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    for bits in (0o660, 0o642):
        path.write_text("")
        path.chmod(bits)
        with pytest.raises(ConfigError, match=f"mode {bits:04o}.*chmod 640"):
            read_allowed(path)


def test_list_is_changed_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    keys = [new_pair().public for _ in range(16)]
    done: list[str] = []

    def add(key: str, name: str) -> None:
        while key not in done:
            try:
                allow(path, Client(name, key, TRAINER))
            except BusyError:
                continue
            done.append(key)

    threads = [threading.Thread(target=add, args=(key, f"k{number}")) for number, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_allowed(path)) == set(keys)


def test_odd_bytes_in_the_list_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    path.write_bytes(b"# one\n# tw\xc3\xb6\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="allowed:2: holds bytes that are not ASCII"):
        read_allowed(path)


# --- following it --------------------------------------------------------------------------------


def test_follower_reads_what_has_changed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    follower = AllowedFile(path)
    assert follower.read_if_changed() == {}
    assert follower.read_if_changed() is None
    allow(path, Client("anne", ANNE, TRAINER))
    assert list(follower.read_if_changed() or ()) == [ANNE]
    assert follower.read_if_changed() is None
    revoke(path, "anne")
    assert follower.read_if_changed() == {}


def test_follower_complains_of_each_broken_file_once(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    follower = AllowedFile(path)
    allow(path, Client("anne", ANNE, TRAINER))
    follower.read_if_changed()
    good = path.read_text()
    for wrong in ("garbage\n", "more garbage\n"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="allowed:1:"):
            follower.read_if_changed()
        assert follower.read_if_changed() is None
    path.unlink()
    with pytest.raises(ConfigError, match="is gone; to allow nobody"):
        follower.read_if_changed()
    assert follower.read_if_changed() is None
    path.write_text(good)
    path.chmod(0o640)
    assert list(follower.read_if_changed() or ()) == [ANNE]


def test_list_that_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    os.mkfifo(path, 0o640)
    with pytest.raises(ConfigError, match="is no regular file"):
        AllowedFile(path).read_if_changed()


def test_follower_refuses_a_list_that_others_could_replace_until_they_cannot(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    directory.mkdir()
    path = directory / "allowed"
    allow(path, Client("anne", ANNE, TRAINER))
    follower = AllowedFile(path)
    for bits in (0o770, 0o1777):
        directory.chmod(bits)
        with pytest.raises(ConfigError, match=f"keys may be written by others.*mode {bits:04o}.*chmod go-w"):
            follower.read_if_changed()
        assert follower.read_if_changed() is None
    directory.chmod(0o750)
    assert list(follower.read_if_changed() or ()) == [ANNE]


def test_follower_refuses_a_list_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "allowed"
    allow(path, Client("anne", ANNE, TRAINER))
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match=r"belongs to user \d+.*chown"):
        AllowedFile(path).read_if_changed()


def test_follower_takes_a_list_that_is_reached_by_links_through_a_directory_for_all(tmp_path: Path) -> None:
    """As in a pod: the Secret's own directory is root's, that of the link is an emptyDir."""
    real, mounted = tmp_path / "real", tmp_path / "mounted"
    for directory in (real, mounted):
        directory.mkdir()
    allow(real / "allowed", Client("anne", ANNE, TRAINER))
    mounted.chmod(0o777)
    (mounted / "allowed").symlink_to(real / "allowed")
    assert list(AllowedFile(mounted / "allowed").read_if_changed() or ()) == [ANNE]


def test_fresh_follower_reads_again_and_still_knows_that_there_was_a_list(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    allow(path, Client("anne", ANNE, TRAINER))
    follower = AllowedFile(path)
    follower.read_if_changed()
    assert list(follower.afresh().read_if_changed() or ()) == [ANNE]
    path.unlink()
    with pytest.raises(ConfigError, match="is gone"):
        follower.afresh().read_if_changed()

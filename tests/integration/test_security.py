"""Who may reach a real daemon over tcp, what each role may say there, and what becomes of everybody else."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from click.testing import CliRunner, Result

from cpe_daemon.cli import main
from cpe_daemon.core.roles import Role
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.errors import AccessError, BusyError, CpeError, ProtocolError, from_code
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.links.identity import new_routing_id
from cpe_daemon.links.keys import Credentials, new_pair
from cpe_daemon.publisher import Publisher
from cpe_daemon.wire.codec import Codec, encode
from cpe_daemon.wire.messages import (
    MOST_CHUNK_FRAMES,
    PROTOCOL,
    Abandon,
    Chunk,
    EngineAdd,
    EngineRemove,
    EngineSpec,
    ErrorReply,
    EvictRequest,
    FrontReply,
    ManifestPart,
    Message,
    OpenVersion,
    Ping,
    Pong,
    PushRequest,
    Seal,
    StatusReply,
    StatusRequest,
    TrainerBye,
    TrainerHello,
    TrainerWelcome,
    VersionStatus,
    Watch,
)
from tests.integration.harness import MODEL, RUN, Daemon, Node
from tests.integration.keyring import Keyring
from tests.integration.processes import until
from tests.integration.raw import RawTrainer

HELLO = TrainerHello(PROTOCOL, MODEL, RUN, 0, 1)
VERSION = VersionId(MODEL, RUN, 1)
SHARDS = [Shard("w", "uint8", (100_000,))]
DATA = bytes(range(250)) * 401
RECIPE = {"plain": 6, "nbytes": 64 << 10}

SAYINGS: dict[Role, list[Message]] = {
    Role.TRAINER: [
        OpenVersion(1, VERSION, 1, 256),
        ManifestPart(1, 0, SHARDS),
        Chunk(1, 0, 100),
        Seal(1, bytes(16)),
        Abandon(1, "no reason"),
        TrainerBye(),
        Watch(VERSION),
        Ping(),
        HELLO,
    ],
    Role.OPERATOR: [
        StatusRequest(),
        PushRequest(MODEL),
        EvictRequest(MODEL),
        EngineAdd(EngineSpec("e", "torch")),
        EngineRemove("e"),
    ],
    Role.PEER: [],
}
"""What each role may say. But for the hello, all that is a trainer's is out of place: each gets an answer."""


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


@pytest.fixture
def daemon(node: Node, keys: Keyring) -> Daemon:
    return node.start_daemon(**keys.settings)


class Link:
    """A client with any keys, or none. A context manager."""

    def __init__(self, endpoint: str, credentials: Credentials | None = None) -> None:
        self._dealer = Dealer(endpoint, FrontReply, credentials)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._dealer.close()

    def ask(self, message: Message, *frames: bytes, seconds: float = 10.0) -> Message:
        """Send, and return the answer.

        Raises:
            CpeError: it is a refusal.
        """
        self._dealer.send(message, *frames, timeout=seconds)
        return self.hear(seconds)

    def hear(self, seconds: float = 10.0) -> Message:
        received = self._dealer.receive(seconds)
        assert received is not None, "no answer came"
        message = received[0]
        if isinstance(message, ErrorReply):
            raise from_code(message.error.code, message.error.message)
        return message


def refused(act: Callable[[], object]) -> str:
    """The refusal's text, which has to come soon."""
    began = time.monotonic()
    with pytest.raises(AccessError) as caught:
        act()
    assert time.monotonic() - began < 9, "the answer is known at once, or after a second, and not when time is up"
    return caught.value.message


def cpe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pings(daemon: Daemon, credentials: Credentials) -> bool:
    """Whether the daemon knows these keys: a ping may be out of place, or of the wrong role."""
    try:
        with Link(daemon.tcp_endpoint(), credentials) as link:
            link.ask(Ping())
    except ProtocolError:
        return True
    except AccessError as error:
        return "has the role" in error.message
    return True


# --- at the door ---------------------------------------------------------------------------------


def test_weights_travel_to_who_has_keys_on_both_sides(node: Node, keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("run-7", Role.TRAINER)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    trainer = node.trainer(endpoint=daemon.tcp_endpoint(), landing=False, **keys.terms("run-7"))
    worker = node.engine(recipe=RECIPE)[0]
    trainer.ask("build", recipe=RECIPE, seed=1)
    trainer.publish_live(1)
    assert worker.ask("forward") == trainer.ask("digests")
    assert [(t["transport"], t["model"]) for t in daemon.status()["trainers"]] == [("inline", MODEL)]


def test_this_host_s_own_socket_takes_no_key(node: Node, daemon: Daemon) -> None:
    with Link(daemon.front) as link:
        assert isinstance(link.ask(StatusRequest()), StatusReply)
        assert isinstance(link.ask(HELLO), TrainerWelcome)


def test_client_without_a_key_is_refused(daemon: Daemon) -> None:
    endpoint = daemon.tcp_endpoint()
    with Link(endpoint) as link:
        assert "takes only clients with a key" in refused(lambda: link.ask(StatusRequest()))
    with Publisher(endpoint, model=MODEL, run=RUN) as publisher:
        assert "takes only clients with a key" in refused(lambda: publisher.publish({}, 1))
    shown = cpe("status", "--to", endpoint)
    assert (shown.exit_code, shown.stderr.endswith("[access]\n")) == (3, True)


def test_client_with_a_key_that_is_not_listed_is_refused(keys: Keyring, daemon: Daemon) -> None:
    stranger, endpoint = keys.client("eve"), daemon.tcp_endpoint()
    with Link(endpoint, stranger) as link:
        assert "does not allow this key" in refused(lambda: link.ask(StatusRequest()))
    with Publisher(endpoint, model=MODEL, run=RUN, key=stranger.pair, server_key=stranger.server_key) as publisher:
        assert "does not allow this key" in refused(lambda: publisher.publish({}, 1))
    counted = daemon.status()["counters"]['cpe_protocol_errors_total{socket="handshake"}']
    assert counted >= 2
    assert "client.refused" in daemon.said
    assert stranger.pair.public in daemon.said


def test_client_that_expects_another_daemon_is_refused(keys: Keyring, daemon: Daemon) -> None:
    """It is the client that does not speak to a daemon which cannot prove to have the key."""
    mine = keys.client("run-7", Role.TRAINER)
    wrong = Credentials(mine.pair, new_pair().public)
    with Link(daemon.tcp_endpoint(), wrong) as link:
        said = refused(lambda: link.ask(StatusRequest()))
    assert "ended the connection during the handshake" in said
    assert "is the server key given here its public key" in said
    with Publisher(
        daemon.tcp_endpoint(), model=MODEL, run=RUN, key=keys.files["run-7"], server_key=wrong.server_key
    ) as publisher:
        assert "is the server key given here" in refused(lambda: publisher.publish({}, 1))


def test_key_where_none_is_taken_is_refused(node: Node, keys: Keyring) -> None:
    daemon = node.start_daemon(ingest__insecure=True, ingest__listen=["tcp://127.0.0.1:0"])
    with Link(daemon.tcp_endpoint(), keys.client("run-7")) as link:
        assert "takes no keys" in refused(lambda: link.ask(Ping()))


def test_publisher_knows_each_daemon_by_its_own_key(
    node: Node, keys: Keyring, daemon: Daemon, tmp_path: Path, runtime_dir: Path
) -> None:
    mine = keys.client("run-7", Role.TRAINER)
    until(lambda: pings(daemon, mine), "the key is allowed")
    other_keys = Keyring(tmp_path / "other")
    other_keys.pairs["run-7"] = mine.pair
    other_keys.allow("run-7", Role.TRAINER)
    other = node.start_daemon(runtime_dir / "other", **other_keys.settings)
    servers = {daemon.tcp_endpoint(): keys.server.public, other.tcp_endpoint(): other_keys.server.public}
    swapped = dict(zip(servers, reversed(servers.values()), strict=True))
    terms: dict[str, Any] = {"endpoints": list(servers), "landing": False, "key": str(keys.files["run-7"])}
    trainer = node.trainer(**terms, server_key=servers)
    trainer.ask("build", recipe=RECIPE, seed=1)
    trainer.publish_live(1)
    mistaken = node.trainer(**terms, server_key=swapped)
    with pytest.raises(CpeError, match=r"2 of 2 daemons.*is the server key given here"):
        mistaken.ask("publish", version=2)


# --- inside --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_message_takes_its_role(role: Role, keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("one", role)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    with Link(daemon.tcp_endpoint(), credentials) as link:
        for other in Role:
            for message in (saying for saying in SAYINGS[other] if saying not in SAYINGS[role]):
                said = refused(lambda message=message: link.ask(message))  # type: ignore[misc]
                assert f"the key 'one' has the role {role}, and " in said
                assert other in said.partition(" takes ")[2]
        for message in SAYINGS[role]:
            try:
                link.ask(message)
            except AccessError as error:
                pytest.fail(f"{message} was refused: {error}")
            except CpeError:
                continue  # out of place, but not for its role


def test_roles_may_be_several(keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("alice", Role.TRAINER, Role.OPERATOR)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    with Link(daemon.tcp_endpoint(), credentials) as link:
        assert isinstance(link.ask(HELLO), TrainerWelcome)
        assert isinstance(link.ask(StatusRequest()), StatusReply)


def test_revoked_key_is_refused_on_connections_that_exist(keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("run-7", Role.TRAINER)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    with RawTrainer(daemon.tcp_endpoint(), credentials=credentials) as trainer:
        stream = trainer.open(1, SHARDS)
        assert daemon.version(1)["state"] == "receiving"
        keys.revoke("run-7")
        until(lambda: not daemon.status()["trainers"], "its session is dropped")
        assert daemon.version(1)["state"] == "failed"
        with pytest.raises(AccessError, match="session has ended: its key was revoked"):
            trainer.expect(VersionStatus, 5)
        trainer.send(Chunk(stream, 0, 100), bytes(100))
        with pytest.raises(AccessError, match="is not allowed at this daemon any more"):
            trainer.expect(Pong, 5)
        trainer.send(HELLO)
        with pytest.raises(AccessError, match="is not allowed at this daemon any more"):
            trainer.expect(TrainerWelcome, 5)
    assert not pings(daemon, credentials)


def test_publisher_whose_key_is_revoked_says_so_and_goes_on_when_it_is_allowed_again(
    node: Node, keys: Keyring, daemon: Daemon
) -> None:
    credentials = keys.client("run-7", Role.TRAINER)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    trainer = node.trainer(endpoint=daemon.tcp_endpoint(), landing=False, **keys.terms("run-7"))
    trainer.ask("build", recipe=RECIPE, seed=1)
    trainer.publish_live(1)
    keys.revoke("run-7")
    until(lambda: not daemon.status()["trainers"], "its session is dropped")
    until(lambda: "refused: " in trainer.log.read_text(), "the trainer has noticed, and has greeted it in vain")
    with pytest.raises(AccessError, match="does not allow this key"):
        trainer.ask("publish", version=2)
    keys.allow("run-7", Role.TRAINER)
    until(lambda: pings(daemon, credentials), "the key is allowed again")
    trainer.publish_live(3)


def test_trainer_that_is_made_an_operator_loses_its_session(keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("anne", Role.TRAINER)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    with RawTrainer(daemon.tcp_endpoint(), credentials=credentials) as trainer:
        keys.allow("anne", Role.OPERATOR)
        until(lambda: not daemon.status()["trainers"], "its session is dropped")
        with pytest.raises(AccessError, match="or is no trainer's any more"):
            trainer.expect(VersionStatus, 5)
        trainer.send(StatusRequest())
        trainer.expect(StatusReply)


def test_trainers_of_this_host_are_no_keys_business(keys: Keyring, daemon: Daemon) -> None:
    keys.client("run-7", Role.TRAINER)
    with RawTrainer(daemon.front) as trainer:
        keys.revoke("run-7")
        until(lambda: '"curve.list_read"' in daemon.said, "the list was read again")
        trainer.send(Ping())
        trainer.expect(Pong)


def routing_id_of(dealer: Dealer) -> bytes:
    found = dealer._socket.getsockopt(zmq.IDENTITY)
    assert isinstance(found, bytes)
    return found


def steal(daemon: Daemon, thief: Credentials, routing_id: bytes, message: Message) -> None:
    """Say something under a routing id that is not the thief's; it has to be refused."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IDENTITY, routing_id),
            (zmq.CURVE_SERVERKEY, thief.server_key.encode()),
            (zmq.CURVE_PUBLICKEY, thief.pair.public.encode()),
            (zmq.CURVE_SECRETKEY, thief.pair.secret.encode()),
        ):
            dealer.setsockopt(option, value)
        dealer.connect(daemon.tcp_endpoint())
        dealer.send(encode(message))
        answer = answered(dealer)
        assert answer.error.code == "access", answer
        assert "a routing id that is not one of 'thief'" in answer.error.message


def answered(dealer: zmq.Socket[bytes]) -> ErrorReply:
    """The refusal that has come, or comes soon."""
    assert dealer.poll(20_000), "no answer came"
    answer = Codec(FrontReply).decode(dealer.recv_multipart()[0])
    assert isinstance(answer, ErrorReply), answer
    return answer


def test_session_cannot_be_entered_with_another_key(keys: Keyring, daemon: Daemon) -> None:
    """Not even by who knows its routing id: the connection can be taken over, the session cannot."""
    victim, thief = keys.client("victim", Role.TRAINER), keys.client("thief", Role.TRAINER)
    until(lambda: pings(daemon, thief), "the keys are allowed")
    with RawTrainer(daemon.tcp_endpoint(), credentials=victim) as trainer:
        stream = trainer.open(1, SHARDS)
        routing_id = routing_id_of(trainer._dealer)
        for stolen in (new_routing_id(victim.pair.public), new_routing_id(), b"x", routing_id):
            trainer.send(Ping())
            trainer.expect(Pong)
            steal(daemon, thief, stolen, Abandon(stream, "by the thief"))
        assert daemon.version(1)["state"] == "receiving"


def test_trainer_whose_connection_is_taken_over_comes_back(node: Node, keys: Keyring, daemon: Daemon) -> None:
    """libzmq leaves it connected to nobody; it notices that nobody answers, and greets anew."""
    victim, thief = keys.client("victim", Role.TRAINER), keys.client("thief", Role.TRAINER)
    until(lambda: pings(daemon, victim) and pings(daemon, thief), "the keys are allowed")
    with Publisher(
        daemon.tcp_endpoint(), model=MODEL, run=RUN, key=victim.pair, server_key=victim.server_key, landing=False
    ) as publisher:
        (link,) = publisher._links
        session = link.ready(VERSION, 20)
        steal(daemon, thief, routing_id_of(session._dealer), Ping())
        until(lambda: link._session not in (None, session), "it greets anew")
        assert link.ready(VERSION, 20) is not session


def test_routing_ids_of_keys_are_no_use_on_this_host_s_own_socket(keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("run-7", Role.TRAINER)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IDENTITY, new_routing_id(credentials.pair.public))
        dealer.connect(daemon.front)
        dealer.send(encode(StatusRequest()))
        assert "is for clients with keys" in answered(dealer).error.message
    assert daemon.status()["counters"]['cpe_protocol_errors_total{socket="front"}'] == 1


# --- the list and the pair -----------------------------------------------------------------------


def test_broken_list_leaves_the_last_one_in_effect(keys: Keyring, daemon: Daemon) -> None:
    credentials = keys.client("run-7", Role.TRAINER)
    until(lambda: pings(daemon, credentials), "the key is allowed")
    good = keys.allowed.read_text()
    keys.allowed.write_text(good + "garbage\n")
    warnings = until(lambda: daemon.status()["readiness"]["warnings"], "the broken list is noticed")
    assert "allowed:3: has 1 fields" in warnings[0]["message"]
    assert "allowed:3: has 1 fields" in cpe("status", "--runtime-dir", daemon.runtime_dir).stdout
    assert '"curve.list_refused"' in daemon.said
    assert pings(daemon, credentials)
    keys.allowed.write_text(good)
    until(lambda: not daemon.status()["readiness"]["warnings"], "the mended list is read")


def test_daemon_without_a_pair_says_how_to_make_one(node: Node, tmp_path: Path) -> None:
    daemon = node.launch_daemon(security__keys_dir=str(tmp_path / "none"), ingest__listen=["tcp://127.0.0.1:0"])
    daemon.wait()
    assert daemon.exit_status == 2
    assert f"cpe keys new --daemon --dir {tmp_path / 'none'}" in daemon.said


@pytest.mark.parametrize("what", ["pair", "list"])
def test_daemon_does_not_start_with_keys_that_others_could_have_touched(node: Node, keys: Keyring, what: str) -> None:
    keys.client("run-7", Role.TRAINER)
    (keys.allowed if what == "list" else keys.directory / "daemon.key_secret").chmod(0o666)
    daemon = node.launch_daemon(**keys.settings)
    daemon.wait()
    assert daemon.exit_status == 2
    assert "mode 0666" in daemon.said


def test_daemon_without_allowed_keys_starts_and_says_so(node: Node, keys: Keyring) -> None:
    daemon = node.start_daemon(**keys.settings)
    assert '"curve.nobody_allowed"' in daemon.said


def test_insecure_is_said_loudly(node: Node) -> None:
    daemon = node.start_daemon(ingest__insecure=True, ingest__listen=["tcp://127.0.0.1:0"])
    (warning,) = daemon.status()["readiness"]["warnings"]
    assert "lets whoever reaches it replace the weights" in warning["message"]
    assert '"front.insecure"' in daemon.said
    assert "lets whoever reaches it replace" in cpe("status", "--runtime-dir", daemon.runtime_dir).stdout


def test_keys_are_made_and_used_by_command(node: Node, tmp_path: Path) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    assert cpe("keys", "new", "--daemon", "--dir", theirs).exit_code == 0
    assert cpe("keys", "new", "alice", "--dir", mine).exit_code == 0
    assert cpe("keys", "allow", mine / "alice.key", "--role", "operator", "--dir", theirs).exit_code == 0
    daemon = node.start_daemon(security__keys_dir=str(theirs), ingest__listen=["tcp://127.0.0.1:0"])
    ask = ("status", "--to", daemon.tcp_endpoint(), "--server-key", theirs / "daemon.key")
    assert cpe(*ask, "--key", mine / "alice.key_secret").exit_code == 0
    assert cpe("keys", "revoke", "alice", "--dir", theirs).exit_code == 0
    until(lambda: cpe(*ask, "--key", mine / "alice.key_secret").exit_code == 3, "the key is refused")


# --- too much ------------------------------------------------------------------------------------


def hushed(daemon: Daemon) -> int:
    return daemon.said.count('"peer.hushed"')


def test_who_speaks_too_often_is_told_once_and_others_are_heard(node: Node) -> None:
    daemon = node.start_daemon(ingest__messages_per_second=50)
    with RawTrainer(daemon.front) as trainer, Link(daemon.front) as other:
        for _ in range(2000):
            trainer.send(Ping())
        with pytest.raises(BusyError, match=r"ingest\.messages_per_second"):
            trainer.expect(StatusReply, 5)
        assert isinstance(other.ask(StatusRequest()), StatusReply)
        until(
            lambda: daemon.status()["counters"]['cpe_protocol_errors_total{socket="front"}'] >= 1500,
            "what came too soon is counted",
        )
        assert 1 <= hushed(daemon) <= 5
        until(lambda: _answered(trainer), "it is heard again")


def _answered(trainer: RawTrainer) -> bool:
    try:
        trainer.send(Ping())
        trainer.expect(Pong, 2)
    except (BusyError, pytest.fail.Exception):  # it is told once a second
        return False
    return True


@pytest.fixture
def many_frames(daemon: Daemon) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(daemon.front)
        yield dealer


def test_message_of_very_many_frames_is_thrown_away(daemon: Daemon, many_frames: zmq.Socket[bytes]) -> None:
    most = 1 + MOST_CHUNK_FRAMES
    for number in (most + 1, most + 2, most + 3, 100_000):
        for _ in range(number - 1):
            many_frames.send(b"", zmq.SNDMORE)
        many_frames.send(b"")
        assert isinstance(daemon.status(), dict)
        assert answered(many_frames).error.message == f"a message has 1 to {most} frames"
    many_frames.send(encode(Ping()))
    assert answered(many_frames).error.message == "say hello first", "what comes after it is taken"


def test_flood_of_questions_gets_one_answer_many_times(daemon: Daemon) -> None:
    with Link(daemon.front) as link:
        began, seen = time.monotonic(), []
        for _ in range(1000):
            answer = link.ask(StatusRequest())
            assert isinstance(answer, StatusReply)
            seen.append(answer.status["daemon"]["uptime_seconds"])
        made = len(set(seen))
        assert 1 < made <= 200 + 10 * (time.monotonic() - began) + 2
        assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["front.sock", "engines.sock", "tcp"])
def test_connection_that_never_introduces_itself_is_cut(node: Node, keys: Keyring, name: str) -> None:
    daemon = node.start_daemon(**keys.settings, deadlines__hello_seconds=0.3)
    if name == "tcp":
        host, _, port = daemon.tcp_endpoint().removeprefix("tcp://").rpartition(":")
        connection = socket.create_connection((host, int(port)))
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.runtime_dir / name))
    with connection:
        connection.settimeout(20)
        while connection.recv(4096):
            continue  # its greeting

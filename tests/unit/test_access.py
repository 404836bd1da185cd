"""Roles: every message names those that may send it, and a routing id belongs to one key."""

from __future__ import annotations

from typing import get_args

import pytest

from cpe_daemon.core.roles import Role
from cpe_daemon.errors import AccessError
from cpe_daemon.links.access import ROLES, Access
from cpe_daemon.links.allowed import Client
from cpe_daemon.links.identity import new_routing_id
from cpe_daemon.links.keys import new_pair
from cpe_daemon.wire.messages import Chunk, FrontMessage, Message, Ping, Pong, StatusRequest, TrainerHello, Watch

ANNE, BOB, EVE = (new_pair().public for _ in range(3))
CLIENTS = {
    ANNE: Client("anne", ANNE, frozenset({Role.TRAINER})),
    BOB: Client("bob", BOB, frozenset({Role.OPERATOR})),
}


def test_every_message_of_the_front_names_its_roles() -> None:
    assert set(ROLES) == set(get_args(FrontMessage))
    assert all(ROLES.values())


def test_key_is_known_by_its_own_routing_ids() -> None:
    access = Access(CLIENTS)
    assert access.client(new_routing_id(ANNE), ANNE).name == "anne"
    assert ANNE in access
    assert EVE not in access
    assert (access.name(BOB), access.name(EVE)) == ("bob", "")


@pytest.mark.parametrize(
    "peer",
    [new_routing_id(BOB), new_routing_id(EVE), new_routing_id(), b"", b"k", new_routing_id(ANNE) + b"x"],
)
def test_routing_id_that_is_not_the_key_s_is_refused(peer: bytes) -> None:
    with pytest.raises(AccessError, match="routing id"):
        Access(CLIENTS).client(peer, ANNE)


@pytest.mark.parametrize("public", [EVE, None, "", "None"])
def test_key_that_is_not_allowed_is_refused(public: str | None) -> None:
    with pytest.raises(AccessError, match="not allowed"):
        Access(CLIENTS).client(new_routing_id(EVE), public)


@pytest.mark.parametrize(
    ("name", "kind", "may"),
    [
        (ANNE, TrainerHello, True),
        (ANNE, Chunk, True),
        (ANNE, Ping, True),
        (ANNE, StatusRequest, False),
        (BOB, StatusRequest, True),
        (BOB, Ping, False),
        (BOB, Watch, False),
        (BOB, TrainerHello, False),
        (BOB, Chunk, False),
        (ANNE, Pong, False),
    ],
)
def test_message_takes_its_role(name: str, kind: type[Message], may: bool) -> None:
    access = Access(CLIENTS)
    client = access.client(new_routing_id(name), name)
    if may:
        access.check(client, kind)
    else:
        asked = {StatusRequest: "`cpe status`", TrainerHello: "publishing"}.get(kind, kind.__name__)
        with pytest.raises(AccessError, match=f"the key '{client.name}' has the role .* and {asked} takes"):
            access.check(client, kind)


def test_revoked_key_may_nothing_from_then_on() -> None:
    access, peer = Access(CLIENTS), new_routing_id(ANNE)
    assert access.may(peer, TrainerHello)
    access.replace({BOB: CLIENTS[BOB]})
    assert (access.name_of(peer), access.name_of(new_routing_id(EVE))) == ("anne", "")
    assert not access.may(peer, TrainerHello)
    assert not access.may(new_routing_id(BOB), TrainerHello)
    assert access.may(new_routing_id(), TrainerHello), "this host's own sockets have every role"
    with pytest.raises(AccessError, match="any more"):
        access.client(peer, ANNE)

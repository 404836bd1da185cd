"""Who may say what: the roles that each message takes, and who holds the key that it came with.

What comes over this host's own sockets has no key and every role: the modes of their files say who may connect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cpe_daemon.core.roles import Role
from cpe_daemon.errors import AccessError
from cpe_daemon.links.allowed import Client, Clients
from cpe_daemon.links.identity import is_keyed, key_prefix, prefix_of
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    EngineAdd,
    EngineRemove,
    EvictRequest,
    ManifestPart,
    Message,
    OpenVersion,
    Ping,
    PushRequest,
    RollbackRequest,
    Seal,
    StatusRequest,
    TrainerBye,
    TrainerHello,
    TrainerRollback,
    TrainerWait,
    WaitRequest,
    Watch,
)

_TRAINER: Final = frozenset({Role.TRAINER})
_OPERATOR: Final = frozenset({Role.OPERATOR})

ROLES: Final[Mapping[type[Message], frozenset[Role]]] = {
    TrainerHello: _TRAINER,
    OpenVersion: _TRAINER,
    ManifestPart: _TRAINER,
    Chunk: _TRAINER,
    Seal: _TRAINER,
    Abandon: _TRAINER,
    TrainerBye: _TRAINER,
    Watch: _TRAINER,
    Ping: _TRAINER,
    TrainerRollback: _TRAINER,
    TrainerWait: _TRAINER,
    StatusRequest: _OPERATOR,
    PushRequest: _OPERATOR,
    RollbackRequest: _OPERATOR,
    WaitRequest: _OPERATOR,
    EvictRequest: _OPERATOR,
    EngineAdd: _OPERATOR,
    EngineRemove: _OPERATOR,
}
"""The roles of which one is enough for a message. A message that is not here takes more than any role."""

_ASKS: Final[Mapping[type[Message], str]] = {
    TrainerHello: "publishing",
    StatusRequest: "`cpe status`",
    PushRequest: "`cpe push`",
    RollbackRequest: "`cpe rollback`",
    WaitRequest: "`cpe wait`",
    EvictRequest: "`cpe evict`",
    EngineAdd: "`cpe engine add`",
    EngineRemove: "`cpe engine remove`",
}
"""What somebody did who sent such a message, as they know it."""


class Access:
    """The rights of clients with keys. Belongs to the event loop; asked for every message of theirs.

    Args:
        clients: those who are allowed.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients: dict[str, tuple[Client, bytes]] = {}
        self._by_prefix: dict[bytes, Client] = {}
        self._names: dict[bytes, str] = {}
        """Of those who are allowed, and of those who were: what they do on connections that exist is told by name."""
        self.replace(clients)

    def __contains__(self, public: str) -> bool:
        return public in self._clients

    def __len__(self) -> int:
        return len(self._clients)

    def name(self, public: str) -> str:
        """What a key is called here; empty if it is not allowed."""
        return self._clients[public][0].name if public in self._clients else ""

    def replace(self, clients: Clients) -> None:
        """Let these in from now on, and nobody else."""
        self._by_prefix = {prefix_of(public): client for public, client in clients.items()}
        self._clients = {client.public: (client, prefix) for prefix, client in self._by_prefix.items()}
        self._names |= {prefix: client.name for prefix, client in self._by_prefix.items()}

    def name_of(self, peer: bytes) -> str:
        """Who speaks by a routing id that `is_keyed`, for the log; empty if it never was allowed."""
        return self._names.get(key_prefix(peer), "")

    def client(self, peer: bytes, public: str | None) -> Client:
        """Return who sent a message, by the key that its connection proved to have.

        Raises:
            AccessError: the key is not allowed any more, or the routing id is another key's.
        """
        known = self._clients.get(public) if public is not None else None
        if known is None:
            raise AccessError(f"the key {public} is not allowed at this daemon any more; `cpe keys allow` lets it in")
        client, prefix = known
        if not (is_keyed(peer) and peer.startswith(prefix)):
            raise AccessError(f"a routing id that is not one of {client.name!r}: it has to begin with the client's key")
        return client

    def check(self, client: Client, kind: type[Message]) -> None:
        """Refuse a message that takes a role which its sender lacks.

        Raises:
            AccessError: it does; names both.
        """
        enough = ROLES.get(kind, frozenset())
        if enough.isdisjoint(client.roles):
            asked = _ASKS.get(kind, kind.__name__)
            raise AccessError(
                f"the key {client.name!r} has the role {_listed(client.roles, 'and')}, and {asked} takes"
                f" {_listed(enough, 'or')}; `cpe keys allow` on the daemon's node changes a key's roles"
            )

    def may(self, peer: bytes, kind: type[Message]) -> bool:
        """Whether a routing id's owner may send such a message now; one without a key may."""
        if not is_keyed(peer):
            return True
        client = self._by_prefix.get(key_prefix(peer))
        return client is not None and not ROLES[kind].isdisjoint(client.roles)


def _listed(roles: frozenset[Role], word: str) -> str:
    return f" {word} ".join(sorted(roles)) or "none that there is"

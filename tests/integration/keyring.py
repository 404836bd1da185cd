"""Keys for tests: the daemon's pair, clients' pairs, and the list of those that are allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpe_daemon.core.roles import Role
from cpe_daemon.links.allowed import ALLOWED, Client, allow, revoke
from cpe_daemon.links.keys import DAEMON_NAME, Credentials, KeyPair, new_pair, write_pair


class Keyring:
    """The ``keys_dir`` of one daemon, and the pairs of those who know it.

    Args:
        directory: made here.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.allowed = directory / ALLOWED
        self.server = new_pair()
        write_pair(directory, DAEMON_NAME, self.server)
        self._clients = directory.with_name(f"{directory.name}-clients")
        self._clients.mkdir()
        self.pairs: dict[str, KeyPair] = {}
        self.files: dict[str, Path] = {}

    def client(self, name: str, *roles: Role) -> Credentials:
        """Make a pair, and let it in if it gets a role."""
        pair = self.pairs[name] = new_pair()
        self.files[name], _ = write_pair(self._clients, name, pair)
        if roles:
            self.allow(name, *roles)
        return Credentials(pair, self.server.public)

    def allow(self, name: str, *roles: Role) -> None:
        """Let a client in that was made before."""
        allow(self.allowed, Client(name, self.pairs[name].public, frozenset(roles)))

    def revoke(self, name: str) -> None:
        """Let it in no more."""
        revoke(self.allowed, name)

    @property
    def settings(self) -> dict[str, Any]:
        """For `Node.start_daemon`: listen on tcp, with these keys."""
        return {"security__keys_dir": str(self.directory), "ingest__listen": ["tcp://127.0.0.1:0"]}

    def terms(self, name: str) -> dict[str, Any]:
        """For `Node.trainer`: its keys."""
        return {"key": str(self.files[name]), "server_key": self.server.public}

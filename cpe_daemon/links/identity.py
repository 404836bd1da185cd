"""Routing ids, by which a ROUTER tells its peers apart.

That of a client with a key begins with the key. A session belongs to a routing id, so it belongs to a key, and no other
key can speak in it. The rest is random: nobody can guess it, and take a connection over by it.
"""

from __future__ import annotations

import secrets
from typing import Final

from cpe_daemon.links.keys import raw_key

_ANONYMOUS: Final = b"c"
_KEYED: Final = b"k"
_RAW_KEY_BYTES: Final = 32
_RANDOM_BYTES: Final = 16
_KEYED_BYTES: Final = len(_KEYED) + _RAW_KEY_BYTES + _RANDOM_BYTES


def new_routing_id(public: str | None = None) -> bytes:
    """Return a routing id that was never used, for a client with this public key (in Z85) or without one."""
    return (_ANONYMOUS if public is None else prefix_of(public)) + secrets.token_bytes(_RANDOM_BYTES)


def prefix_of(public: str) -> bytes:
    """With what every routing id of a key begins."""
    return _KEYED + raw_key(public)


def key_prefix(routing_id: bytes) -> bytes:
    """Return the prefix of a routing id that `is_keyed`."""
    return routing_id[:-_RANDOM_BYTES]


def is_keyed(routing_id: bytes) -> bool:
    """Whether a routing id is of the form that is kept for clients with keys."""
    return len(routing_id) == _KEYED_BYTES and routing_id.startswith(_KEYED)

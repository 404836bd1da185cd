"""Who may call the routes that pause and update a server: whoever shows one of its API keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from typing import Any

SERVER_KEY = "VLLM_API_KEY"


class Keys:
    """The keys that are accepted; without any, everybody who reaches the server may call it.

    Args:
        keys: plain text; only their digests are kept.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys if key]

    @classmethod
    def of_server(cls, args: Any, environ: Mapping[str, str] = os.environ) -> Keys:
        """Those that vLLM asks for in ``/v1``: of ``--api-key``, else of its environment.

        Args:
            args: the server's.
            environ: whose ``VLLM_API_KEY`` counts where it was given none.
        """
        given = getattr(args, "api_key", None) or environ.get(SERVER_KEY) or ()
        return cls([given] if isinstance(given, str) else given)

    def admit(self, authorization: str | None) -> bool:
        """Whether a request may pass. All keys are compared, and each in a time that does not depend on the answer.

        Args:
            authorization: the request's header.
        """
        if not self._digests:
            return True
        scheme, _, shown = (authorization or "").partition(" ")
        digest = _digest(shown.strip())
        found = [hmac.compare_digest(digest, one) for one in self._digests]
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

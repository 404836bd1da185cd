"""Whom news of a version concern: it may be published again while an earlier attempt is still waited for. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cpe_daemon.core.types import VersionId
from cpe_daemon.publisher.delivery import Delivery
from cpe_daemon.wire.messages import VersionStatus

_FINAL = ("failed", "evicted")


class Watching:
    """The deliveries over one link about which the daemon may still say something. Belongs to the link's thread."""

    def __init__(self) -> None:
        self._deliveries: dict[VersionId, list[Delivery]] = {}  # in the order of their publishing
        self._stale: set[VersionId] = set()  # given up here, and the daemon has not said yet that they failed

    def __iter__(self) -> Iterator[Delivery]:
        """All of them."""
        return iter([delivery for deliveries in self._deliveries.values() for delivery in deliveries])

    def add(self, delivery: Delivery) -> None:
        """Take note of one that is about to be opened."""
        self._deliveries.setdefault(delivery.version, []).append(delivery)

    def drop(self, delivery: Delivery) -> None:
        """Forget one; nothing if it is forgotten already."""
        kept = [other for other in self._deliveries.get(delivery.version, ()) if other is not delivery]
        if kept:
            self._deliveries[delivery.version] = kept
        else:
            self._deliveries.pop(delivery.version, None)

    def clear(self) -> None:
        """Forget all: the link is over."""
        self._deliveries.clear()

    def given_up(self, version: VersionId) -> None:
        """What was being received of it fails at the daemon, which will say so: that concerns no later attempt."""
        self._stale.add(version)

    def opened(self, version: VersionId) -> None:
        """The daemon has begun anew with it: what it says from now on is about that."""
        self._stale.discard(version)

    def take(self, status: VersionStatus) -> list[Delivery]:
        """Have those believe what the daemon says whom it concerns; return and forget those that are over now."""
        stale = status.version in self._stale
        if status.state in _FINAL:
            self._stale.discard(status.version)
        if status.state == "failed" and stale:
            return []  # an earlier attempt did
        over: list[Delivery] = []
        for earlier, delivery in enumerate(self._deliveries.get(status.version, ())):
            if delivery.comparing or not (delivery.opened or (status.state == "failed" and not earlier)):
                continue  # said of an earlier attempt: whether this is the same version is not known yet
            delivery.take(status)
            over += [delivery] if delivery.over else []
        for delivery in over:
            self.drop(delivery)
        return over

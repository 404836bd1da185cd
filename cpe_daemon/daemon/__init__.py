"""The daemon of a node: `daemon` builds and joins its parts, `service` is its life as a process."""

from cpe_daemon.daemon.service import serve

__all__ = ["serve"]

"""Inference-engine plugins for cpe-daemon, one thin folder an engine.

Each folder has two halves. The worker half runs inside the engine's own processes and loads weights from the
daemon's slots; the driver half runs in the daemon and speaks the engine's control API. The daemon finds
drivers through the entry-point group `cpe_daemon.engines`, so a plugin may live in any distribution.
"""

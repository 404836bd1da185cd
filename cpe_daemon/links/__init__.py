"""Sockets that carry `cpe_daemon.wire`'s messages.

`router` is the daemon's side, on its event loop. `dealer` is the client's, for a thread of a trainer's or an engine's
process. `handoff` passes file descriptors over a unix socket, and notices at once when the process at the other end
dies.
"""

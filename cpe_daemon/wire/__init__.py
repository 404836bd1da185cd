"""Typed messages and their codec. No sockets here: `cpe_daemon.links` carries what this room defines."""

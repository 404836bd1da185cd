"""The ``cpe`` command, a module a subcommand. What one needs it imports when it runs, so help is quick."""

from cpe_daemon.cli.app import main

__all__ = ["main"]

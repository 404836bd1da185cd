"""The command ``cpe`` and what all its subcommands share: help that teaches, and one way to fail."""

from __future__ import annotations

import click

from cpe_daemon import __version__
from cpe_daemon.cli.completion import completion_command
from cpe_daemon.cli.demo import demo_command
from cpe_daemon.cli.doctor import doctor_command
from cpe_daemon.cli.engine import engine_command
from cpe_daemon.cli.evict import evict_command
from cpe_daemon.cli.failures import FailingGroup, debug_option
from cpe_daemon.cli.keys import keys_command
from cpe_daemon.cli.publish import publish_command
from cpe_daemon.cli.push import push_command
from cpe_daemon.cli.rollback import rollback_command
from cpe_daemon.cli.serve import serve_command
from cpe_daemon.cli.settings import config_command
from cpe_daemon.cli.status import status_command
from cpe_daemon.cli.version import version_command
from cpe_daemon.cli.wait import wait_command

_EPILOG = """\b
Try it, without a GPU:
  cpe demo --small

\b
On an inference node:
  cpe config --default > cpe.yaml      every setting, explained
  cpe config --config cpe.yaml         check it, and see what is in effect
  cpe doctor --config cpe.yaml         what this host lacks for it, and the mend
  cpe serve --config cpe.yaml
  cpe status --watch
  cpe push policy                      a version that waits, or the live one again
  cpe rollback policy                  the version that was live before
  cpe wait policy --version 12         until it is live

\b
From a trainer's side:
  cpe publish ./checkpoint --model qwen3 --version 7 --to ipc:///run/cpe/front.sock

\b
Environment:
  CPE_CONFIG              configuration file (--config)
  CPE_RUNTIME_DIR         directory of the daemon's sockets
  CPE_KEY, CPE_SERVER_KEY this side's secret key file, and the daemon's public key (--key, --server-key)
  CPE_<SECTION>__<NAME>   any setting, for example CPE_DEVICE__SLOTS=4
  CPE_DEBUG=1             as --debug

\b
Exit status:
  0  done                             5  a deadline passed
  1  a bug in cpe, or cpe doctor      6  no room, or busy
     found what does not work
  2  command line or configuration    7  an engine or a publish failed
  3  asked for something impossible,  130  interrupted
     or not allowed to this key
  4  peer unreachable or misbehaving
"""


@click.group(
    cls=FailingGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="cpe-daemon")
@debug_option
def main() -> None:
    """Live weight updates for LLM inference.

    A daemon on each inference node takes new versions of a model's weights from trainers, and pushes them
    into the running engines, in place.
    """


for command in (
    serve_command,
    config_command,
    doctor_command,
    publish_command,
    push_command,
    rollback_command,
    wait_command,
    evict_command,
    status_command,
    engine_command,
    keys_command,
    demo_command,
    completion_command,
    version_command,
):
    main.add_command(command)

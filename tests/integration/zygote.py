"""The process that the others are forked from: it has imported torch and the daemon, which takes seconds, once.

Run as ``python -m tests.integration.zygote FD``: takes requests over the seqpacket socket FD until it is closed at the
other end. What it forks dies with it, and it dies with the test process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

# Imported for the children's sake.
import tests.integration.daemon_process
import tests.integration.engine_worker
import tests.integration.trainer  # noqa: F401

_PR_SET_PDEATHSIG = 1
_REQUEST_BYTES = 1 << 16


def main(channel: socket.socket) -> None:
    """Fork a child for every request, which comes with three descriptors for its 0, 1 and 2.

    A request is ``{"module": ..., "arguments": {...}, "status": path}``; the file gets the exit status of a child that
    is not killed. One with ``preload`` has the zygote import a module that children to come will need.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for children; the kernel reaps them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.send(b"ready")
    while True:
        request, fds, _, _ = socket.recv_fds(channel, _REQUEST_BYTES, 3)
        if not request:
            return
        wanted = json.loads(request)
        if "preload" in wanted:
            importlib.import_module(wanted["preload"])
            channel.send(b"ready")
            continue
        pid = os.fork()
        if pid == 0:
            _become(wanted, fds)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(channel, [str(pid).encode()], [pidfd])
        for fd in (*fds, pidfd):
            os.close(fd)


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Turn into what was asked for; never returns."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    os.closerange(3, 1024)
    status = 1
    try:
        torch.set_num_threads(1)
        importlib.import_module(f"tests.integration.{request['module']}").main(request["arguments"])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - the child ends here, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        Path(request["status"]).write_text(str(status))
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        main(inherited)

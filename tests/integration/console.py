"""The child's side of a conversation in JSON lines: commands on stdin, answers and events on stdout."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cpe_daemon.errors import CpeError

_GO_SECONDS = 60.0

Verb = Callable[..., object]


class Console:
    """Answers ``{"id": 1, "do": "verb", "with": {...}}`` by ``{"id": 1, "result": ...}``, one command after another.

    Only ``go`` is taken at any time: it lets what waits at the `Gate` go on.
    """

    def __init__(self) -> None:
        self.gate = Gate(self)
        self._commands: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.Lock()
        os.dup2(2, 1)  # whoever prints does not disturb the conversation
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)

    def tell(self, event: str, **fields: object) -> None:
        """Say that something happened. Any thread."""
        self._say({"event": event, **fields})

    def serve(self, verbs: Mapping[str, Verb]) -> None:
        """Carry out commands until stdin ends."""
        threading.Thread(target=self._read, name="console", daemon=True).start()
        verbs = {"arm": self.gate.arm, "trim": _trim, **verbs}
        while (command := self._commands.get()) is not None:
            self._say({"id": command["id"], **_outcome(verbs[command["do"]], command["with"])})

    def _read(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "go":
                self.gate.go(**command["with"])
                self._say({"id": command["id"], "result": None})
            else:
                self._commands.put(command)
        self._commands.put(None)

    def _say(self, message: Mapping[str, object]) -> None:
        with self._lock:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()


def _outcome(verb: Verb, arguments: Mapping[str, Any]) -> dict[str, object]:
    try:
        return {"result": verb(**arguments)}
    except CpeError as error:
        return {"error": {"code": error.code, "message": error.message}}
    except Exception as error:  # noqa: BLE001 - the test shall see whatever it was
        return {"error": {"code": None, "message": f"{type(error).__name__}: {error}"}}


def _trim() -> None:
    """Give memory that nobody uses back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Gate:
    """A place in a process's work where it stops or stumbles, when the test has armed it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._at = 0
        self._then = "wait"
        self._every = False
        self._count = 0
        self._verdict: queue.Queue[str] = queue.Queue()

    def arm(self, at: int = 0, then: str = "wait", every: bool = False) -> None:
        """At the ``at``-th pass from now on (1 is the next; 0: never) "wait" for the test, or "raise".

        ``every``: at all later ones too.
        """
        self._at, self._then, self._every, self._count = at, then, every, 0

    def go(self, then: str = "go") -> None:
        """Let the one who waits go on; "raise": by an exception."""
        self._verdict.put(then)

    def pass_by(self) -> None:
        """Called by the work, again and again."""
        self._count += 1
        if not self._at or self._count < self._at or (self._count > self._at and not self._every):
            return
        then = self._then
        if then == "wait":
            self._console.tell("reached", at=self._count)
            then = self._verdict.get(timeout=_GO_SECONDS)
        if then == "raise":
            raise RuntimeError(f"told to raise at pass {self._count}")

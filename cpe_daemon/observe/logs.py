"""Log events: named ``noun.verb`` with bound fields, on standard error, for a person or for a machine.

Rooms write ``log = structlog.get_logger(__name__)`` and ``log.info("version.staged", version=str(version))``. Such a
line goes past the standard library's logging, which would take three times as long: a push has ten of them. What
libraries write through that has the same form.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "console", "json"]

_PRIORITIES: Final[Mapping[str, int]] = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Syslog's priorities, as journald reads them from the beginning of a line: ``<6>``."""

_FIRST: Final = ("ts", "level", "event", "logger")


def configure_logging(level: Level = "info", format: Format = "auto", *, stream: TextIO | None = None) -> bool:
    """Send every log event from ``level`` up to ``stream``; replaces what was configured before.

    Returns:
        Whether they are written as JSON.

    Args:
        level: the least important events that are written.
        format: ``auto`` is the console's form on a terminal and JSON lines elsewhere.
        stream: None for standard error. JSON lines that go straight to journald carry its priority prefix.
    """
    stream = sys.stderr if stream is None else stream
    machine = format == "json" or (format == "auto" and not stream.isatty())
    threshold = getattr(logging, level.upper())
    render = _as_json(stream) if machine else _for_people(stream)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(structlog.stdlib.add_logger_name),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    structlog.configure(
        processors=[*_shared(_add_name), *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda name="": _Lines(name, stream, handler),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    logging.captureWarnings(True)
    return machine


class _Lines:
    """Where one room's lines end. Thread-safe.

    Args:
        name: the room's.
        stream: what is written to. A line that it does not take is lost: nothing else is to fail because of that.
        handler: writes to it as well, and locks.
    """

    def __init__(self, name: str, stream: TextIO, handler: logging.Handler) -> None:
        self.name = name
        self._stream = stream
        self._handler = handler

    def _write(self, line: str) -> None:
        self._handler.acquire()
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (OSError, ValueError):
            return
        finally:
            self._handler.release()

    debug = info = warning = error = critical = _write


def _add_name(logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["logger"] = logger.name
    return event


def _shared(add_name: Processor) -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        add_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.StackInfoRenderer(),
    ]


def _as_json(stream: TextIO) -> list[Processor]:
    dump = structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
    render = _with_priority(dump) if _is_journal(stream) else dump
    return [structlog.processors.format_exc_info, _in_order, render]


def _for_people(stream: TextIO) -> list[Processor]:
    console = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(),
        timestamp_key="ts",
        exception_formatter=structlog.dev.plain_traceback,  # the fancy one prints every local
    )
    return [_printable, console]


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters: a name that a peer chose must not steer the terminal. JSON does so too."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable() and name not in {"exception", "stack"}:
            event[name] = value.encode("unicode_escape").decode("ascii")
    return event


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put the fields that every line has first, so that lines can be read one below another."""
    return {name: event.pop(name) for name in _FIRST if name in event} | dict(event)


def _with_priority(dump: structlog.processors.JSONRenderer) -> Processor:
    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        line: Any = dump(logger, method, event)
        return f"<{_PRIORITIES.get(str(event.get('level')), 6)}>{line}"

    return render


def _is_journal(stream: TextIO) -> bool:
    """Whether ``stream`` is the one that systemd connected to the journal, named in ``JOURNAL_STREAM``."""
    try:
        entry = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{entry.st_dev}:{entry.st_ino}"

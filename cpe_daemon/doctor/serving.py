"""Checks of what runs: the daemon, the engines that it knows, and the servers of engines."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any, Final

from cpe_daemon import __version__
from cpe_daemon.doctor.at_once import at_once
from cpe_daemon.doctor.finding import Judgement, fail, listed, skip, warn, worst
from cpe_daemon.doctor.subject import EngineUrl, Subject

_SLOW_SECONDS: Final = 1.0
_HEALTH_SECONDS: Final = 5.0
_WELL: Final = frozenset({"current", "updating"})


def judge_daemon(subject: Subject) -> Judgement:
    """Whether a daemon runs, answers soon, and is the release that is installed."""
    if subject.shut_out:
        return fail(f"nobody knows: this user may not enter {subject.runtime_dir}", _let_in(subject.runtime_dir))
    answer, owner = subject.answer(), subject.owner()
    if answer is None:
        if owner is not None:
            return warn(
                f"process {owner} is starting a daemon in {subject.runtime_dir}", "wait; `journalctl` shows how far"
            )
        return skip(f"no daemon runs in {subject.runtime_dir}")
    if answer.status is None:
        socket = subject.host.entry(subject.front)
        if socket is not None and not socket.writable:
            return fail(
                f"this user may not open {subject.front} (the socket's mode is 0660)",
                _let_in(subject.front),
            )
        if owner is None:
            return skip(f"no daemon runs in {subject.runtime_dir}, where a killed one left its sockets")
        return fail(
            f"the daemon (pid {owner}) does not answer: {answer.problem}",
            f"look at its log (`journalctl -u cpe-daemon`), and at `cat /proc/{owner}/stack`; then restart it",
        )
    daemon = answer.status.get("daemon")
    about = daemon if isinstance(daemon, Mapping) else {}
    found = f"cpe-daemon {about.get('version')} answered in {answer.seconds * 1000:.0f} ms"
    judged = []
    if answer.seconds > _SLOW_SECONDS:
        judged.append(warn(f"{found}, which is slow", "look for what keeps the host busy (`top`, swapping)"))
    if about.get("version") != __version__:
        judged.append(
            warn(
                f"cpe-daemon {about.get('version')} runs, and {__version__} is installed",
                "restart it when engines allow",
            )
        )
    return worst(judged, f"{found} (pid {about.get('pid')}, node {about.get('node')})")


def _let_in(path: str) -> str:
    """What somebody does who is kept out of the daemon's files."""
    return f"run this as root or as the daemon's user, or join the group of {path}: `usermod -aG GROUP USER`"


def judge_engines(subject: Subject) -> Judgement:
    """Whether every engine that is attached has all its ranks and holds what it should."""
    status = subject.status()
    if not status:
        return skip("no daemon answers: see daemon")
    engines = _entries(status, "engines")
    if not engines:
        return skip("no engine is attached")
    names = listed([str(engine.get("engine")) for engine in engines])
    judged = [one for engine in engines if (one := _judge_engine(engine)) is not None]
    return worst(judged, f"{len(engines)} attached, with all their ranks: {names}")


def _judge_engine(engine: Mapping[str, Any]) -> Judgement | None:
    """What is wrong with one; None if nothing."""
    name, state = engine.get("engine"), str(engine.get("state"))
    known = _entries(engine, "workers")
    missing = [str(worker.get("rank")) for worker in known if not worker.get("present")]
    why = f" ({engine.get('error')})" if engine.get("error") else ""
    if engine.get("expected") and len(missing) == len(known):
        return fail(
            f"engine {name} is expected and not attached{why}", f"start it, or forget it: `cpe engine remove {name}`"
        )
    if state == "quarantined":
        return fail(
            f"engine {name} is quarantined: it could not be given back what it held{why}",
            "publish a version, or restart the engine: either ends it",
        )
    if missing:
        return fail(
            f"engine {name} lacks ranks {listed(missing)} of {engine.get('world_size')}{why}",
            "look at the engine's log: these workers have ended, or did not attach",
        )
    if state not in _WELL or not engine.get("ready"):
        return warn(
            f"engine {name} is {state} and not ready{why}",
            "publish a version of its model, or wait for the one on its way",
        )
    return None


def judge_engine_urls(subject: Subject) -> Judgement:
    """Whether the servers of engines say that they are well."""
    engines = [*subject.engines, *_told(subject)]
    if not engines:
        return skip("no engine's URL is known: `cpe engine add` and --engine tell some")
    asked = [functools.partial(subject.host.get, _health(engine), _HEALTH_SECONDS) for engine in engines]
    answers = dict(at_once(asked, _HEALTH_SECONDS))  # the sum of an answer's parts may take longer than each may
    late = f"nothing within {_HEALTH_SECONDS:g} s"
    judged = [_judge_health(engine, answers.get(number, late)) for number, engine in enumerate(engines)]
    names = listed([engine.name for engine in engines])
    return worst([one for one in judged if one is not None], f"healthy: {names}")


def _told(subject: Subject) -> list[EngineUrl]:
    """Engines whose URL the daemon was told by `cpe engine add`, as it says, or as its file does while it is down."""
    told = _entries(subject.status(), "engines")
    if not told and subject.needs is not None:
        text = subject.host.read(subject.needs.engines_file)
        with contextlib.suppress(ValueError):  # a damaged file: the daemon says so when it starts
            kept = json.loads(text or "{}")
            told = _entries(kept, "engines") if isinstance(kept, dict) else []
    return [
        EngineUrl(str(one.get("engine") or one.get("name")), str(one.get("kind")), str(one["url"]))
        for one in told
        if one.get("url")
    ]


def _entries(section: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of objects; what is none of that is not in it, for a daemon of another release may say something else."""
    entries = section.get(name)
    return [one for one in entries if isinstance(one, Mapping)] if isinstance(entries, list) else []


def _health(engine: EngineUrl) -> str:
    return f"{engine.url.rstrip('/')}/health"  # vLLM's and SGLang's alike


def _judge_health(engine: EngineUrl, answer: int | str) -> Judgement | None:
    """What is wrong with one; None if nothing."""
    if answer == 200:
        return None
    whose = f"engine {engine.name} ({engine.kind})"
    if isinstance(answer, int):
        return warn(f"{whose} answers {_health(engine)} with {answer}", "look at its log; it may still be loading")
    return fail(f"{whose} does not answer {_health(engine)}: {answer}", "start it, or correct its URL")

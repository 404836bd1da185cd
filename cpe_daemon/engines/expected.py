"""The engines that an operator expects on this node: told by command, and kept over restarts of the daemon.

They live in one file of the state directory. A file that cannot be understood ends the start: to guess would be to
forget engines that somebody counts on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog

from cpe_daemon.core.names import check_names
from cpe_daemon.errors import BusyError, ConfigError, MisuseError, ProtocolError
from cpe_daemon.statefile import StateFile
from cpe_daemon.wire.messages import EngineSpec, WorkerHello

log = structlog.get_logger(__name__)

MAX_NAME_CHARS: Final = 256
MAX_WORKERS: Final = 4096
"""Of one engine, and of a node."""

_FORMAT: Final = 1
_MAX_ENGINES: Final = 1024


class _Header(msgspec.Struct):
    """What files of all formats have."""

    format: int


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """A file of format 1."""

    format: int
    engines: list[EngineSpec]


class Expected:
    """The expected engines by name. Belongs to the event loop; the file is written by a thread.

    Args:
        path: of the file; it need not exist, nor its directory.
        kinds: of engines, that have a plugin here.

    Raises:
        ConfigError: the file cannot be read, or is none of ours; names it and the mend.
    """

    def __init__(self, path: Path, kinds: Collection[str]) -> None:
        self._file = StateFile(path)
        self._kinds = kinds
        self._writing = asyncio.Lock()
        self._specs = _decoded(path, self._file.content) if self._file.content is not None else {}
        for spec in self:
            if spec.kind not in kinds:
                log.warning("engine.no_plugin", engine=spec.name, kind=spec.kind, installed=sorted(kinds))

    def __iter__(self) -> Iterator[EngineSpec]:
        """All of them; the set may change while one iterates."""
        return iter(tuple(self._specs.values()))

    def get(self, name: str) -> EngineSpec | None:
        """What is expected of an engine, if it is expected."""
        return self._specs.get(name)

    def url(self, name: str) -> str:
        """Where an operator says that an engine's own API is; "" if none says so."""
        spec = self._specs.get(name)
        return spec.url if spec is not None else ""

    def why_absent(self, spec: EngineSpec) -> str:
        """What keeps an expected engine away of which nobody has been heard."""
        if spec.kind not in self._kinds:
            return f"expected, but no plugin for engines of kind {spec.kind!r} is installed"
        return "expected, but none of its workers has attached to this daemon"

    def check(self, spec: EngineSpec) -> None:
        """Refuse what cannot be expected.

        Raises:
            MisuseError: it has no name, no plugin, a URL that is none, or is expected otherwise already.
        """
        _check_terms(spec)
        check_names(engine=spec.name, model=spec.model)
        if spec.kind not in self._kinds:
            installed = ", ".join(sorted(self._kinds))
            raise MisuseError(f"no plugin for engines of kind {spec.kind!r} is installed; there is: {installed}")
        known = self._specs.get(spec.name)
        if known not in (None, spec):
            raise MisuseError(
                f"engine {spec.name!r} is expected already, otherwise; say `cpe engine remove {spec.name}` first"
            )

    async def add(self, spec: EngineSpec) -> None:
        """Expect an engine from now on; returns when that would survive a crash.

        Raises:
            MisuseError: as `check` does.
            BusyError: there are too many.
            CpeError: the file cannot be written, as `StateFile.replace` says; nothing has changed.
        """
        async with self._writing:
            self.check(spec)
            if self._specs.get(spec.name) == spec:
                return
            if len(self._specs) >= _MAX_ENGINES:
                raise BusyError(f"{len(self._specs)} engines are expected here already; no more are taken")
            await self._replace({**self._specs, spec.name: spec})

    async def remove(self, name: str) -> None:
        """Expect an engine no longer; raises as `add` does for what concerns the file."""
        async with self._writing:
            if name in self._specs:
                await self._replace({known: spec for known, spec in self._specs.items() if known != name})

    async def _replace(self, specs: dict[str, EngineSpec]) -> None:
        """Set what is expected. It holds for workers that say hello while it is written already."""
        before, self._specs = self._specs, specs
        content = msgspec.json.encode(_File(_FORMAT, list(specs.values())))
        written = False
        try:
            await self._file.replace(msgspec.json.format(content, indent=2) + b"\n")
            written = True
        finally:
            if not written:
                self._specs = before


def check_hello(hello: WorkerHello) -> None:
    """Refuse a worker whose engine has no name that can be used.

    Raises:
        ProtocolError: a name is missing or too long, or no incarnation is said.
        MisuseError: a name has blanks or control characters.
    """
    if not 0 < len(hello.engine) <= MAX_NAME_CHARS or len(hello.model) > MAX_NAME_CHARS or not hello.incarnation:
        raise ProtocolError(f"an engine needs a name of 1 to {MAX_NAME_CHARS} characters, and an incarnation")
    check_names(engine=hello.engine, model=hello.model)


def check_fit(spec: EngineSpec, *, kind: str, model: str, world_size: int) -> None:
    """Refuse an engine that is not the one expected by its name.

    Args:
        spec: what is expected; what it leaves open may be anything.
        kind: the engine's.
        model: whose versions it takes; "" if it takes any.
        world_size: how many ranks it has.

    Raises:
        MisuseError: names what differs.
    """
    pairs = (("kind", spec.kind, kind), ("model", spec.model, model), ("world size", spec.world_size, world_size))
    wrong = [(what, wanted, got) for what, wanted, got in pairs if wanted and got and wanted != got]
    if wrong:
        wanted = ", ".join(f"{what} {wanted}" for what, wanted, _ in wrong)
        got = ", ".join(f"{what} {got}" for what, _, got in wrong)
        raise MisuseError(
            f"engine {spec.name!r} is expected with {wanted} and has {got}; start it as expected, or"
            f" `cpe engine remove {spec.name}` and add it as it is"
        )


def _check_terms(spec: EngineSpec) -> None:
    """Refuse terms that no engine could have.

    Raises:
        MisuseError: says which.
    """
    if not 0 < len(spec.name) <= MAX_NAME_CHARS or not spec.name.isprintable() or spec.name != spec.name.strip():
        raise MisuseError(f"an engine needs a name of 1 to {MAX_NAME_CHARS} printable characters")
    if not spec.kind or len(spec.kind) > MAX_NAME_CHARS:
        raise MisuseError(f"engine {spec.name!r} needs a kind, such as torch")
    if len(spec.model) > MAX_NAME_CHARS or not spec.model.isprintable():
        raise MisuseError(f"engine {spec.name!r}: a model's name has at most {MAX_NAME_CHARS} printable characters")
    if not 0 <= spec.world_size <= MAX_WORKERS:
        raise MisuseError(f"engine {spec.name!r}: a world size of {spec.world_size}; it is 1 to {MAX_WORKERS}")
    if spec.url:
        _check_url(spec.url)


def _check_url(url: str) -> None:
    """Refuse what is not the address of an HTTP server, on a port or on a Unix socket.

    Raises:
        MisuseError: says what to write.
    """
    wanted = f"{url!r} is not a URL of an engine; write http://HOST:PORT, as in http://127.0.0.1:8000, or unix:///PATH"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise MisuseError(f"{wanted} ({error})") from None
    if parts.scheme == "unix":
        there = not parts.netloc and len(parts.path) > 1
    else:
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and bool(port)
    if not there or not url.isprintable() or " " in url:
        raise MisuseError(wanted)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise MisuseError(f"{wanted}; everybody who may ask for the status sees it, so no secret belongs in it")


def _decoded(path: Path, content: bytes) -> dict[str, EngineSpec]:
    """Return what a file says.

    Raises:
        ConfigError: it is damaged, or of a later release.
    """
    mend = "mend it, or remove it and add the engines anew (`cpe engine add`)"
    try:
        found = msgspec.json.decode(content, type=_Header).format
        if found != _FORMAT:
            raise ConfigError(f"{path} has format {found}, and this release reads {_FORMAT}: upgrade, or {mend}")
        specs = msgspec.json.decode(content, type=_File).engines
        for spec in specs:
            _check_terms(spec)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path}, which names the engines that are expected here, is damaged ({error}): {mend}"
        ) from None
    except ConfigError:
        raise
    except MisuseError as error:
        raise ConfigError(f"{path}: {error.message}: {mend}") from None
    names = [spec.name for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path} names {', '.join(sorted(twice))} more than once: {mend}")
    return dict(zip(names, specs, strict=True))

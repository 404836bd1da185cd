"""`attach`: lets the daemon of this node pause and update a vLLM that is no server, in the process that uses it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cpe_daemon.errors import CpeError, MisuseError
from inference_plugins.vllm.endpoints import CpeEndpoints
from inference_plugins.vllm.keys import Keys
from inference_plugins.vllm.offline import OfflineEngine
from inference_plugins.vllm.register import BACKEND
from inference_plugins.vllm.settings import Settings

API_KEY: Final = "CPE_VLLM_API_KEY"

_CLOSE_SECONDS: Final = 10.0
_LAST_REQUEST_SECONDS: Final = 5


class Attachment:
    """A vLLM whose API, for the daemon alone, is served by a thread. Made by `attach`; a context manager.

    Attributes:
        url: where the daemon reaches it.
    """

    def __init__(self, engine: Any, listener: socket.socket, url: str, directory: str, keys: Keys) -> None:
        self.url = url
        self._engine = engine
        self._directory = directory
        self._listener = listener
        config = uvicorn.Config(
            _app(engine, keys),
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=_LAST_REQUEST_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="cpe-api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the daemon reach it no more; what is paused stays so. Call it before the engine is let go."""
        self._server.should_exit = True
        self._thread.join(_CLOSE_SECONDS)
        if isinstance(self._engine, OfflineEngine):
            self._engine.close()
        self._listener.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._listener])


def attach(llm: Any, *, url: str = "") -> Attachment:
    """Have an `LLM` of this process take part in updates.

    It was made with ``weight_transfer_config=WeightTransferConfig(backend="cpe")``, and is used as ever. Updates come
    between two steps of its engine, and what is being generated goes on with the new weights; with
    ``CPE_VLLM_PAUSE_MODE=wait`` in the daemon's environment they come between two calls such as ``generate``. Calls
    wait for an update's end.

    Args:
        llm: an `LLM`, in this process or with its engine in others.
        url: where the daemon shall reach this process: ``unix:///PATH``, or ``http://HOST:PORT``, with a key in
            ``CPE_VLLM_API_KEY``; "": as ``CPE_ENGINE_URL`` says, or else a socket that this user and root may open.

    Raises:
        MisuseError: it was made without that, or cannot be updated from one process; says why.
        DeadlineError: the daemon could not be told, for a round was under way all the time.
    """
    if not hasattr(llm, "llm_engine"):
        raise MisuseError(f"{type(llm).__name__} is no vllm.LLM; for an AsyncLLM there is attach_async")
    settings = Settings.read()
    _check(llm.llm_engine.vllm_config)
    attachment = _attachment(OfflineEngine(llm, settings.update_seconds), url or settings.url)
    try:
        llm.init_weight_transfer_engine({"init_info": {"url": attachment.url}})
    except BaseException:  # task boundary: nothing is left behind
        attachment.close()
        raise
    return attachment


async def attach_async(engine: Any, *, url: str = "") -> Attachment:
    """As `attach`, for an `AsyncLLM` that runs in this event loop; ``CPE_VLLM_PAUSE_MODE`` may be any of the three."""
    if not hasattr(engine, "pause_generation"):
        raise MisuseError(f"{type(engine).__name__} is no AsyncLLM; for a vllm.LLM there is attach")
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    settings = Settings.read()
    _check(engine.vllm_config)
    attachment = _attachment(_Elsewhere(engine, asyncio.get_running_loop()), url or settings.url)
    try:
        await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={"url": attachment.url}))
    except BaseException:  # task boundary: nothing is left behind
        await asyncio.to_thread(attachment.close)
        raise
    return attachment


class _Elsewhere:
    """An `AsyncLLM`, called from another thread's event loop."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._engine, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            work = method(*arguments, **named)
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

        return call


def _check(vllm_config: Any) -> None:
    """Refuse what one process cannot pause.

    Raises:
        MisuseError: says why.
    """
    transfer = vllm_config.weight_transfer_config
    if transfer is None or transfer.backend != BACKEND:
        raise MisuseError(f'it was made without weight_transfer_config=WeightTransferConfig(backend="{BACKEND}")')
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise MisuseError(
            "its ranks are steered by a process each (external_launcher), which would have to pause at the same step:"
            " let vLLM start its workers itself, or use one rank for each engine"
        )


def _attachment(engine: Any, address: str) -> Attachment:
    listener, url, directory = _listen(address)
    return Attachment(engine, listener, url, directory, Keys([os.environ.get(API_KEY, "")]))


def _listen(address: str) -> tuple[socket.socket, str, str]:
    """Open a socket.

    Returns:
        It, its URL, and a directory that goes when it does; "" if there is none.

    Raises:
        MisuseError: there can be none at this address.
    """
    directory = ""
    if not address:
        directory = tempfile.mkdtemp(prefix="cpe-vllm-")
        address = f"unix://{directory}/api.sock"
    parts = urlsplit(address)
    if parts.scheme not in ("unix", "http"):
        raise MisuseError(f"{address!r} is neither unix:///PATH nor http://HOST:PORT")
    if parts.scheme == "http" and not os.environ.get(API_KEY):
        raise MisuseError(f"everybody on this host may connect to {address}: set {API_KEY} here and for the daemon")
    listener = socket.socket(socket.AF_UNIX if parts.scheme == "unix" else socket.AF_INET)
    try:
        if parts.scheme == "unix":
            Path(parts.path).unlink(missing_ok=True)
            listener.bind(parts.path)
            Path(parts.path).chmod(0o660)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((parts.hostname, parts.port or 0))
            address = "http://{}:{}".format(*listener.getsockname())
        listener.listen()
    except OSError as error:
        listener.close()
        shutil.rmtree(directory or "/nonexistent", ignore_errors=True)
        raise MisuseError(f"cannot listen at {address}: {error}") from None
    return listener, address, directory


def _app(engine: Any, keys: Keys) -> FastAPI:
    """Our routes, and one by which `cpe doctor` sees that somebody is there."""
    app = FastAPI(openapi_url=None)
    endpoints = CpeEndpoints()
    endpoints.attach_router(app)
    endpoints.serve(engine, keys)

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": error.message if isinstance(error, CpeError) else str(error)}, 500)

    app.get("/health")(health)
    app.add_exception_handler(CpeError, failed)
    return app

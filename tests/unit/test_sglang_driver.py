"""The daemon's half for SGLang against an HTTP server that answers as SGLang's does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cpe_daemon.core.driver import Update
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, EngineError, PeerLostError, VerificationError
from inference_plugins.sglang import driver as module
from inference_plugins.sglang.driver import SglangDriver

VERSION = VersionId("m", "r", 1)
UPDATE = Update(1, VERSION, 2, 64, digest=b"one")
LONG, SHORT = 10.0, 0.05
SETTINGS = (module.ADMIN_KEY, module.API_KEY, module.CA_FILE, module.PAUSE_MODE, module.CACHE, module.CHECK)
ROUTES = ("pause_generation", "continue_generation", "update_weight_version", "weights_checker")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_TELL_AGAIN_SECONDS", 0.01)


class FakeServer:
    """Some of SGLang's routes; notes what it is asked, beside what workers are.

    Args:
        key: that it wants; "" wants none.
    """

    def __init__(self, key: str = "") -> None:
        self.calls: list[str] = []
        self.bodies: dict[str, Any] = {}
        self.key = key
        self.fails = ""
        self.hangs = ""
        self.taken = True
        self.checksum: str | None = "c1"
        self.updating = asyncio.Event()
        """Whether a call to update_weights_from_ipc is here."""
        self.released = asyncio.Event()
        """Lets it return."""
        self.told = asyncio.Event()
        """Whether the server was told its version."""
        self.app = web.Application()
        self.app.router.add_get("/list_external_corpora", self.harmless)
        self.app.router.add_post("/update_weights_from_ipc", self.update)
        for name in ROUTES:
            self.app.router.add_post(f"/{name}", self.plain)

    async def harmless(self, request: web.Request) -> web.Response:
        refused = await self.refusal(request)
        return refused or web.json_response({"success": False, "message": "not enabled"}, status=400)

    async def plain(self, request: web.Request) -> web.Response:
        refused = await self.refusal(request)
        if refused is not None:
            return refused
        if request.path == "/update_weight_version":
            self.told.set()
        said = {"message": "ok", "status": "ok"}
        if request.path == "/weights_checker" and self.checksum is not None:
            said["per_engine_checksum"] = self.checksum
        return web.json_response(said)

    async def update(self, request: web.Request) -> web.Response:
        self.updating.set()
        await self.released.wait()
        refused = await self.refusal(request)
        if refused is not None:
            return refused
        said = {"success": self.taken, "message": "taken" if self.taken else "the version was not taken: late"}
        return web.json_response(said, status=200 if self.taken else 400)

    async def refusal(self, request: web.Request) -> web.Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        name = request.path[1:]
        self.calls.append(request.path)
        if request.method == "POST":
            self.bodies[name] = await request.json()
        if name == self.hangs:
            await asyncio.Event().wait()
        return web.json_response({"error": {"message": "no"}}, status=500) if name == self.fails else None


class FakeWorkers:
    """Note what they are asked in the server's list."""

    def __init__(self, server: FakeServer, url: str) -> None:
        self.url = url
        self.world_size = 1
        self.starting = False
        self._server = server
        self.touched = True
        self.releases = True

    async def check(self, round: int, seconds: float) -> None:
        self._server.calls.append("check")

    async def halt(self, round: int, seconds: float) -> int | None:
        raise NotImplementedError

    async def pause(self, round: int, seconds: float, passes: int | None = None) -> None:
        self._server.calls.append("pause")

    async def begin(self, update: Update, seconds: float) -> None:
        if not self.starting:
            await asyncio.wait_for(self._server.updating.wait(), LONG)  # SGLang's thread is in the gate only then
        self._server.calls.append("begin")

    async def finish(self, round: int, seconds: float) -> None:
        self._server.calls.append("finish")
        if self.releases:
            self._server.released.set()

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        self._server.calls.append(f"abort {reason}")
        if self.releases:
            self._server.taken = False
            self._server.released.set()
        return self.touched

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        self._server.calls.append("resume")

    async def wake(self, seconds: float) -> None:
        raise NotImplementedError


Serve = Callable[..., contextlib.AbstractAsyncContextManager[tuple[SglangDriver, FakeServer, FakeWorkers]]]


@pytest.fixture
def serve(runtime_dir: Path) -> Serve:
    """Runs a server on a Unix socket, and gives its driver."""

    @contextlib.asynccontextmanager
    async def running(key: str = "") -> AsyncIterator[tuple[SglangDriver, FakeServer, FakeWorkers]]:
        server = FakeServer(key)
        runner = web.AppRunner(server.app, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(runtime_dir / "s.sock")).start()
        workers = FakeWorkers(server, f"unix://{runtime_dir}/s.sock")
        driver = SglangDriver("s", workers)
        try:
            yield driver, server, workers
        finally:
            server.released.set()
            driver._tell_no_more()
            await runner.cleanup()

    return running


async def round_of(driver: SglangDriver, update: Update = UPDATE) -> None:
    """All steps of one that goes well."""
    await driver.check(1, LONG)
    await driver.pause(1, LONG)
    await driver.begin(update, LONG)
    await driver.finish(1, LONG)
    await driver.resume(1, VERSION, LONG)


def again(server: FakeServer) -> None:
    """Make ready for another round."""
    server.calls.clear()
    server.updating.clear()
    server.released.clear()
    server.taken = True


# --- a round ---------------------------------------------------------------------------------------------------------


async def test_round_in_its_order(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        for _ in range(2):
            again(server)
            await round_of(driver)
            assert server.calls == [
                "/list_external_corpora",
                "check",
                "/pause_generation",
                "pause",
                "begin",
                "finish",
                "/update_weights_from_ipc",
                "resume",
                "/continue_generation",
            ]
        assert server.bodies["pause_generation"] == {"mode": "retract"}
        asked = {"zmq_handles": {"cpe": ""}, "flush_cache": True, "weight_version": "m@r#1"}
        assert server.bodies["update_weights_from_ipc"] == asked


async def test_server_that_starts_is_not_called_but_told_its_version_later(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.starting = True
        await round_of(driver)
        assert server.calls == ["check", "pause", "begin", "finish", "resume"]
        await asyncio.wait_for(server.told.wait(), LONG)
        assert server.bodies["update_weight_version"] == {"new_version": "m@r#1", "abort_all_requests": False}


async def test_server_is_told_its_version_as_soon_as_it_is_there(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.starting = True
        url, workers.url = workers.url, "http://127.0.0.1:1"
        await driver.resume(1, VERSION, LONG)
        await asyncio.sleep(0.05)
        assert not server.told.is_set()
        workers.url = url
        await asyncio.wait_for(server.told.wait(), LONG)


async def test_server_that_starts_with_what_is_on_disk_is_told_nothing(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.starting = True
        await driver.resume(1, None, LONG)
        await asyncio.sleep(0.05)
        assert server.calls == ["resume"]


async def test_server_is_not_told_an_old_version_once_a_round_begins(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.starting = True
        url, workers.url = workers.url, "http://127.0.0.1:1"
        await driver.resume(1, VERSION, LONG)
        workers.starting, workers.url = False, url
        await driver.pause(2, LONG)
        await asyncio.sleep(0.05)
        assert not server.told.is_set()


async def test_server_that_does_not_let_itself_be_told_is_left_alone(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.starting = True
        server.fails = "update_weight_version"
        await driver.resume(1, VERSION, LONG)
        telling = driver._telling
        assert telling is not None
        await asyncio.wait_for(telling, LONG)
        assert server.calls.count("/update_weight_version") == 1


async def test_call_lasts_until_the_workers_have_finished(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        await driver.begin(UPDATE, LONG)
        assert server.updating.is_set()
        assert server.calls == ["begin"]
        await driver.finish(1, LONG)
        assert server.calls == ["begin", "finish", "/update_weights_from_ipc"]


async def test_abort_ends_the_call_and_leaves_the_server_paused(serve: Serve) -> None:
    """What the call says, that the version was not taken, is nothing new."""
    async with serve() as (driver, server, workers):
        for touched in (True, False):
            workers.touched = touched
            again(server)
            await driver.pause(1, LONG)
            await driver.begin(UPDATE, LONG)
            server.calls.clear()
            assert await driver.abort(1, "late", LONG) is touched
            assert server.calls == ["abort late", "/update_weights_from_ipc"]


async def test_abort_before_begin_calls_no_server(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        await driver.abort(1, "early", LONG)
        assert server.calls == ["abort early"]


async def test_rank_that_did_not_take_the_version_fails_it(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        server.taken = False
        await driver.begin(UPDATE, LONG)
        with pytest.raises(EngineError, match="'s': /update_weights_from_ipc failed: 400 the version was not taken"):
            await driver.finish(1, LONG)


async def test_update_that_does_not_return_ends_at_the_deadline(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.releases = False
        await driver.begin(UPDATE, LONG)
        with pytest.raises(DeadlineError, match=r"update_weights_from_ipc did not return within 0\.05 s"):
            await driver.finish(1, SHORT)
        await driver.abort(1, "it hung", SHORT)  # the call was given up: nothing is awaited again
        assert server.calls[-1] == "abort it hung"


# --- checksums -------------------------------------------------------------------------------------------------------


async def test_checksum_of_a_version_stays_the_same(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.CHECK, "checksum")
    async with serve() as (driver, server, _):
        await round_of(driver)
        assert server.calls[-3:] == ["/weights_checker", "resume", "/continue_generation"]
        assert server.bodies["weights_checker"] == {"action": "checksum"}
        again(server)
        server.checksum = "c2"
        await round_of(driver, Update(2, VERSION, 2, 64, digest=b"two"))
        again(server)
        with pytest.raises(VerificationError, match=r"another checksum \(c2\) than when it was last given .* \(c1\)"):
            await round_of(driver)


async def test_server_that_says_no_checksum_is_not_believed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.CHECK, "checksum")
    async with serve() as (driver, server, _):
        server.checksum = None
        with pytest.raises(VerificationError, match="says no checksum"):
            await round_of(driver)


async def test_checksums_of_few_versions_are_remembered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.CHECK, "checksum")
    monkeypatch.setattr(module, "_MOST_CHECKSUMS", 2)
    async with serve() as (driver, server, _):
        for digest in (b"one", b"two", b"three"):
            again(server)
            await round_of(driver, Update(1, VERSION, 2, 64, digest=digest))
        again(server)
        server.checksum = "other"
        await round_of(driver)  # the first is forgotten


# --- keys, failures --------------------------------------------------------------------------------------------------


async def test_key_is_asked_for_and_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve("secret") as (driver, server, _):
        with pytest.raises(EngineError, match="takes no calls without its key; set CPE_SGLANG_ADMIN_API_KEY"):
            await driver.check(1, LONG)
        monkeypatch.setenv(module.API_KEY, "wrong")
        for step in (driver.check, driver.pause):
            with pytest.raises(EngineError, match="takes no calls with this key") as refused:
                await step(1, LONG)
            assert "wrong" not in str(refused.value)
        monkeypatch.setenv(module.ADMIN_KEY, "secret")
        await round_of(driver)
        assert server.calls[-1] == "/continue_generation"
        monkeypatch.delenv(module.ADMIN_KEY)
        monkeypatch.setenv(module.API_KEY, "secret")
        await driver.check(1, LONG)


async def test_server_that_is_none_says_so(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        server.fails = "list_external_corpora"
        await driver.check(1, LONG)  # whatever it says there: it is one, and takes our key
        app = web.AppRunner(web.Application())
        await app.setup()
        await web.TCPSite(app, "127.0.0.1", 0).start()
        host, port = app.addresses[0]
        other = SglangDriver("s", FakeWorkers(server, f"http://{host}:{port}"))
        try:
            with pytest.raises(EngineError, match="is no SGLang server that can be paused"):
                await other.check(1, LONG)
        finally:
            await app.cleanup()


@pytest.mark.parametrize("name", ["list_external_corpora", "pause_generation", "continue_generation"])
async def test_server_that_hangs_costs_a_deadline(serve: Serve, name: str) -> None:
    async with serve() as (driver, server, _):
        server.hangs = name
        steps: dict[str, Callable[[], Awaitable[None]]] = {
            "list_external_corpora": lambda: driver.check(1, 1.0),
            "pause_generation": lambda: driver.pause(1, 1.0),
            "continue_generation": lambda: driver.resume(1, VERSION, 1.0),
        }
        with pytest.raises(DeadlineError, match=rf"engine 's': /{name} took longer than 1 s"):
            await steps[name]()


@pytest.mark.parametrize("name", ["pause_generation", "update_weights_from_ipc", "continue_generation"])
async def test_refusal_is_passed_on(serve: Serve, name: str) -> None:
    async with serve() as (driver, server, _):
        server.fails = name
        with pytest.raises(EngineError, match=f"engine 's': /{name} failed: 500 .*no"):
            await round_of(driver)


async def test_server_that_is_not_there(serve: Serve) -> None:
    async with serve() as (_, server, _workers):
        lost = SglangDriver("s", FakeWorkers(server, "http://127.0.0.1:1"))
        with pytest.raises(PeerLostError, match=r"engine 's' at http://127\.0\.0\.1:1: "):
            await lost.check(1, LONG)
        nowhere = SglangDriver("s", FakeWorkers(server, ""))
        with pytest.raises(EngineError, match="cpe engine add s --kind sglang --url URL`, or set CPE_ENGINE_URL"):
            await nowhere.check(1, LONG)


async def test_server_cannot_be_woken_up(serve: Serve) -> None:
    async with serve() as (driver, _, _):
        with pytest.raises(EngineError, match="woken up by who had it sleep"):
            await driver.wake(LONG)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
async def test_pause_mode(serve: Serve, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv(module.PAUSE_MODE, mode)
    async with serve() as (driver, server, _):
        await driver.pause(1, LONG)
        assert server.bodies["pause_generation"] == {"mode": mode}


async def test_cache_may_be_kept(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.CACHE, "keep")
    async with serve() as (driver, server, _):
        await round_of(driver)
        assert server.bodies["update_weights_from_ipc"]["flush_cache"] is False


async def test_setting_that_is_not_known(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (module.PAUSE_MODE, module.CACHE, module.CHECK):
        monkeypatch.setenv(name, "sometimes")
    async with serve() as (driver, _, _):
        with pytest.raises(EngineError, match=r"PAUSE_MODE is 'sometimes'; it may be retract, in_place, abort$"):
            await driver.pause(1, LONG)
        with pytest.raises(EngineError, match=r"CACHE is 'sometimes'; it may be flush, keep$"):
            await driver.begin(UPDATE, LONG)
        monkeypatch.delenv(module.CACHE)
        await driver.begin(UPDATE, LONG)
        with pytest.raises(EngineError, match=r"CHECK is 'sometimes'; it may be off, checksum$"):
            await driver.finish(1, LONG)

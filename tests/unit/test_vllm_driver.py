"""The daemon's half for vLLM against an HTTP server that answers as vLLM's does, on a Unix socket and over TCP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cpe_daemon.core.driver import Update
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, EngineError, PeerLostError
from inference_plugins.vllm import driver as module
from inference_plugins.vllm.driver import VllmDriver

VERSION = VersionId("m", "r", 1)
UPDATE = Update(1, VERSION, 2, 64)
LONG, SHORT = 10.0, 0.05
SETTINGS = (module.API_KEY, module.CA_FILE, module.PAUSE_MODE, module.CACHE)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


class FakeServer:
    """Some of vLLM's routes; notes what it is asked, beside what workers are.

    Args:
        prefixes: before the routes that it has. Below ``/cpe`` they are ours, of the version that `version` says.
        key: that it wants; "" wants none.
    """

    def __init__(self, *prefixes: str, key: str = "") -> None:
        self.calls: list[str] = []
        self.told: list[object] = []
        """What came with the end of each session."""
        self.key = key
        self.fails = ""
        self.hangs = ""
        self.without = "/none"
        self.version: object = 2
        self.connections: set[object] = set()
        """Over which anything but the first look came."""
        self.core = asyncio.Lock()
        """It does one thing after the other, in their order."""
        self.updating = asyncio.Event()
        """Whether a call to update_weights is here."""
        self.released = asyncio.Event()
        """Lets update_weights return."""
        self.app = web.Application()
        for prefix in prefixes:
            for name in ("pause", "resume", "start_weight_update", "finish_weight_update", "reset_prefix_cache"):
                self.app.router.add_post(f"{prefix}/{name}", self.plain)
            self.app.router.add_post(f"{prefix}/update_weights", self.update)
            self.app.router.add_post(f"{prefix}/update", self.update)
            self.app.router.add_get(f"{prefix}/is_paused", self.plain)

    async def plain(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path.startswith(self.without):
            return web.Response(status=404)
        name = request.path.rpartition("/")[2]
        if name == "is_paused":
            return await self.done(request, name)
        async with self.core:
            return await self.done(request, name)

    async def done(self, request: web.Request, name: str) -> web.Response:
        said = await request.read()
        self.calls.append(f"{request.path_qs} {said.decode()}" if name == "resume" and said else request.path_qs)
        if name == "finish_weight_update":
            self.told.append(json.loads(said))
        if name == self.hangs:
            await asyncio.Event().wait()
        if name == self.fails:
            return web.json_response({"error": {"message": "no", "code": 500}}, status=500)
        if name != "is_paused":
            self.connections.add(request.transport)
        ours = name == "is_paused" and request.path.startswith("/cpe") and self.version is not None
        return web.json_response({"version": self.version} if ours else {})

    async def update(self, request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        assert name == "update" or await request.json() == {"update_info": {}}
        async with self.core:
            self.updating.set()
            await self.released.wait()
            return await self.done(request, name)


class FakeWorkers:
    """Note what they are asked in the server's list."""

    def __init__(self, server: FakeServer, url: str) -> None:
        self.url = url
        self.world_size = 1
        self.starting = False
        self._server = server
        self.error: Exception | None = None
        self.touched = True
        self.releases = True

    def _note(self, what: str) -> None:
        self._server.calls.append(what)
        if self.error is not None:
            raise self.error

    async def check(self, round: int, seconds: float) -> None:
        self._note("check")

    async def halt(self, round: int, seconds: float) -> int | None:
        raise NotImplementedError

    async def pause(self, round: int, seconds: float, passes: int | None = None) -> None:
        self._note("pause")

    async def begin(self, update: Update, seconds: float) -> None:
        assert update == UPDATE
        if not self.starting:
            await asyncio.wait_for(self._server.updating.wait(), LONG)  # vLLM's thread is in the gate only then
        self._note("begin")

    async def finish(self, round: int, seconds: float) -> None:
        self._note("finish")
        if self.releases:
            self._server.released.set()

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        self._note(f"abort {reason}")
        if self.releases:
            self._server.released.set()
        return self.touched

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        self._note("resume")

    async def wake(self, seconds: float) -> None:
        raise NotImplementedError


Serve = Callable[..., contextlib.AbstractAsyncContextManager[tuple[VllmDriver, FakeServer, FakeWorkers]]]


@pytest.fixture(params=["unix", "tcp"])
def serve(request: pytest.FixtureRequest, runtime_dir: Path) -> Serve:
    """Runs a server, and gives its driver."""

    @contextlib.asynccontextmanager
    async def running(*prefixes: str, key: str = "") -> AsyncIterator[tuple[VllmDriver, FakeServer, FakeWorkers]]:
        server = FakeServer(*(prefixes or ("",)), key=key)
        runner = web.AppRunner(server.app, shutdown_timeout=0.1)
        await runner.setup()
        if request.param == "unix":
            await web.UnixSite(runner, str(runtime_dir / "v.sock")).start()
            url = f"unix://{runtime_dir}/v.sock"
        else:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            url = f"http://{host}:{port}"
        workers = FakeWorkers(server, url)
        driver = VllmDriver("v", workers)
        try:
            yield driver, server, workers
        finally:
            await driver._api.part()  # a round that a test does not end
            server.released.set()
            await runner.cleanup()

    return running


async def round_of(driver: VllmDriver) -> None:
    """All steps of one that goes well."""
    await driver.check(1, LONG)
    await driver.pause(1, LONG)
    await driver.begin(UPDATE, LONG)
    await driver.finish(1, LONG)
    await driver.resume(1, VERSION, LONG)


# --- a round ---------------------------------------------------------------------------------------------------------


async def test_round_in_its_order(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        for _ in range(2):
            server.calls.clear()
            server.updating.clear()
            server.released.clear()
            await round_of(driver)
            calls = [call for call in server.calls if call != "/is_paused"]
            calls[2:4], calls[7:9] = sorted(calls[2:4]), sorted(calls[7:9])  # at once
            assert calls == [
                "check",
                "/start_weight_update",
                "/pause?mode=keep&clear_cache=false",
                "pause",
                "begin",
                "finish",
                "/update_weights",
                "/finish_weight_update",
                "/reset_prefix_cache?reset_running_requests=true",
                "resume",
                "/resume",
            ]
            assert server.told[-1] == {"weight_version": "m@r#1"}


async def test_server_that_starts_is_not_called(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.starting = True
        await round_of(driver)
        assert server.calls == ["check", "pause", "begin", "finish", "resume"]


async def test_server_whose_workers_serve_from_this_round_on_is_not_resumed(serve: Serve) -> None:
    """It was starting when they were told to serve."""
    async with serve() as (driver, server, workers):
        workers.starting = True
        resume = workers.resume

        async def serving(*arguments: Any) -> None:
            await resume(*arguments)
            workers.starting = False

        vars(workers)["resume"] = serving
        await driver.resume(1, VERSION, LONG)
        assert server.calls == ["resume"]


async def test_call_to_update_weights_lasts_until_the_workers_have_finished(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        await driver.begin(UPDATE, LONG)
        assert server.updating.is_set()
        assert "/update_weights" not in server.calls
        await driver.finish(1, LONG)
        calls = [call for call in server.calls if call != "/is_paused"]
        assert calls[:3] == ["begin", "finish", "/update_weights"]


async def test_abort_ends_the_session_and_leaves_the_server_paused(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        for touched in (True, False):
            workers.touched = touched
            server.updating.clear()
            server.released.clear()
            await driver.pause(1, LONG)
            await driver.begin(UPDATE, LONG)
            server.calls.clear()
            assert await driver.abort(1, "late", LONG) is touched
            assert server.calls[:2] == ["abort late", "/update_weights"]
            assert sorted(server.calls[2:]) == [
                "/finish_weight_update",
                "/reset_prefix_cache?reset_running_requests=true",
            ]
            assert server.told[-1] == {}


async def test_abort_before_begin_calls_no_server(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        await driver.abort(1, "early", LONG)
        assert server.calls == ["abort early"]


async def test_update_that_does_not_return_ends_at_the_deadline(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.releases = False
        await driver.begin(UPDATE, LONG)
        with pytest.raises(DeadlineError, match=r"update_weights did not return within 0\.05 s"):
            await driver.finish(1, SHORT)
        await driver.abort(1, "it hung", SHORT)  # the call was given up: nothing is awaited again
        assert "/finish_weight_update" not in server.calls


async def test_workers_that_fail_to_begin_leave_a_session_that_abort_ends(serve: Serve) -> None:
    async with serve() as (driver, server, workers):
        workers.error = EngineError("no")
        with pytest.raises(EngineError, match="no"):
            await driver.begin(UPDATE, LONG)
        workers.error = None
        await driver.abort(1, "no", LONG)
        assert server.calls[-1] == "/finish_weight_update"


async def test_failing_update_is_reported(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        server.fails = "update_weights"
        await driver.begin(UPDATE, LONG)
        with pytest.raises(EngineError, match=r"'v': /update_weights failed: 500 .*no"):
            await driver.finish(1, LONG)


# --- a server that starts --------------------------------------------------------------------------------------------


async def test_server_has_arrived_when_it_answers_if_only_to_refuse(serve: Serve) -> None:
    async with serve(key="secret") as (driver, _, workers):
        url, workers.url = workers.url, "http://127.0.0.1:1"
        assert (await driver.answers(), driver.arrived) == (False, False)
        workers.url = url
        assert (await driver.answers(), driver.arrived) == (True, True)


async def test_server_whose_workers_wait_for_a_version_need_not_answer_and_then_has_to(serve: Serve) -> None:
    async with serve("/cpe") as (driver, _, workers):
        seen = []
        workers.starting = True
        seen.append(driver.arrived)
        await driver.resume(1, VERSION, LONG)
        workers.starting = False
        seen.append(driver.arrived)
        await round_of(driver)
        seen.append(driver.arrived)
        assert seen == [True, False, True]


# --- our own routes --------------------------------------------------------------------------------------------------


async def test_update_by_our_own_routes_is_one_call(serve: Serve) -> None:
    async with serve("/cpe") as (driver, server, _):
        await round_of(driver)
        calls = [call for call in server.calls if call != "/cpe/is_paused"]
        calls[1:3] = sorted(calls[1:3])  # at once
        assert calls == [
            "check",
            "/cpe/pause?mode=keep&clear_cache=false&session=true",
            "pause",
            "begin",
            "finish",
            "/cpe/update?cache=recompute",
            "resume",
            '/cpe/resume {"cache": "keep", "weight_version": "m@r#1"}',
        ]


@pytest.mark.parametrize("prefix", ["/cpe", ""])
async def test_round_keeps_one_connection_while_it_calls_one_thing_after_the_other(serve: Serve, prefix: str) -> None:
    async with serve(prefix) as (driver, server, _):
        await driver.pause(1, LONG)
        await driver.begin(UPDATE, LONG)
        assert len(server.connections) == 1
        await driver.finish(1, LONG)
        await driver.resume(1, VERSION, LONG)
        assert prefix == "" or len(server.connections) == 1


async def test_server_that_is_elsewhere_now_is_called_there(serve: Serve, tmp_path: Path) -> None:
    async with serve("/cpe") as (driver, server, workers):
        url, workers.url = workers.url, f"unix://{tmp_path}/none.sock"
        with pytest.raises(PeerLostError):
            await driver.pause(1, LONG)
        workers.url = url
        await driver.pause(2, LONG)
        await driver.resume(2, VERSION, LONG)
        assert any(call.startswith("/cpe/resume") for call in server.calls)


@pytest.mark.parametrize("version", [None, 1, "2", [2]])
async def test_routes_of_an_older_release_of_ours_take_three_calls(serve: Serve, version: object) -> None:
    async with serve("/cpe") as (driver, server, _):
        server.version = version
        await round_of(driver)
        assert "/cpe/start_weight_update" in server.calls
        assert "/cpe/update_weights" in server.calls
        assert server.told == [{"weight_version": "m@r#1"}]
        assert server.calls[-1] == "/cpe/resume"


async def test_abort_by_our_own_routes_awaits_the_call_and_drops_caches_when_it_resumes(serve: Serve) -> None:
    async with serve("/cpe") as (driver, server, _):
        await driver.pause(1, LONG)
        await driver.begin(UPDATE, LONG)
        server.calls.clear()
        await driver.abort(1, "late", LONG)
        assert server.calls == ["abort late", "/cpe/update?cache=recompute"]
        await driver.resume(1, None, LONG)
        assert server.calls[2:] == ["resume", '/cpe/resume {"cache": "recompute"}']


@pytest.mark.parametrize("name", ["pause", "update", "resume"])
async def test_refusal_of_our_own_routes_is_passed_on(serve: Serve, name: str) -> None:
    async with serve("/cpe") as (driver, server, _):
        server.fails = name
        with pytest.raises(EngineError, match=f"engine 'v': /{name} failed: 500 .*no"):
            await round_of(driver)


# --- routes ----------------------------------------------------------------------------------------------------------


async def test_own_routes_are_used_first(serve: Serve) -> None:
    async with serve("", "/cpe") as (driver, server, _):
        await round_of(driver)
        assert next(call for call in server.calls if call.startswith("/")) == "/cpe/is_paused"
        assert all(call.startswith("/cpe/") for call in server.calls if call.startswith("/"))


async def test_routes_are_looked_for_at_each_check_and_not_in_between(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        for count in (1, 2):
            await driver.check(1, LONG)
            await driver.pause(1, LONG)
            await driver.resume(1, VERSION, LONG)
            assert server.calls.count("/is_paused") == count


async def test_server_that_was_started_again_may_have_other_routes(serve: Serve) -> None:
    async with serve("", "/cpe") as (driver, server, _):
        await driver.check(1, LONG)
        await driver.pause(1, LONG)
        server.without = "/cpe"
        server.calls.clear()
        await driver.check(2, LONG)
        await driver.pause(2, LONG)
        paused = ["/start_weight_update", "/pause?mode=keep&clear_cache=false", "pause"]
        assert sorted(server.calls) == sorted(["/is_paused", "check", *paused])


async def test_server_without_routes_says_how_to_start_it(serve: Serve) -> None:
    async with serve("/other") as (driver, _, _):
        with pytest.raises(EngineError, match="cannot be paused by its API: start vLLM with VLLM_PLUGINS=cpe, or with"):
            await driver.check(1, LONG)


async def test_key_is_asked_for_and_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(key="secret") as (driver, server, _):
        for given in (None, "wrong"):
            if given is not None:
                monkeypatch.setenv(module.API_KEY, given)
            how = "with this" if given else "without its"
            with pytest.raises(EngineError, match=f"takes no calls {how} key; set CPE_VLLM_API_KEY") as refused:
                await driver.check(1, LONG)
            assert "wrong" not in str(refused.value)
        monkeypatch.setenv(module.API_KEY, "secret")
        await driver.check(1, LONG)
        assert server.calls == ["/is_paused", "check"]


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["is_paused", "pause", "start_weight_update", "resume", "reset_prefix_cache"])
async def test_server_that_hangs_costs_a_deadline(serve: Serve, name: str) -> None:
    async with serve() as (driver, server, _):
        server.hangs = name
        seconds = 1.0  # other calls come before it, and have as long
        with pytest.raises(DeadlineError, match=rf"engine 'v': /{name} took longer than {seconds:g} s"):
            await {
                "is_paused": lambda: driver.check(1, seconds),
                "pause": lambda: driver.pause(1, seconds),
                "start_weight_update": lambda: driver.pause(1, seconds),
            }.get(name, lambda: driver.resume(1, VERSION, seconds))()


@pytest.mark.parametrize(
    "name", ["pause", "start_weight_update", "resume", "finish_weight_update", "reset_prefix_cache"]
)
async def test_refusal_is_passed_on(serve: Serve, name: str) -> None:
    async with serve() as (driver, server, _):
        server.fails = name
        with pytest.raises(EngineError, match=f"engine 'v': /{name} failed: 500 .*no"):
            await round_of(driver)


async def test_server_that_is_not_there(serve: Serve) -> None:
    async with serve() as (_, server, workers):
        for url in ("http://127.0.0.1:1", "unix:///nowhere/v.sock"):
            lost = FakeWorkers(server, url)
            with pytest.raises(PeerLostError, match=f"engine 'v' at {url}: /is_paused: "):
                await VllmDriver("v", lost).check(1, LONG)
        assert workers.url
        assert server.calls == []


async def test_server_whose_address_nobody_says(serve: Serve) -> None:
    async with serve() as (_, server, _):
        with pytest.raises(EngineError, match="cpe engine add v --kind vllm --url URL`, or set CPE_ENGINE_URL"):
            await VllmDriver("v", FakeWorkers(server, "")).check(1, LONG)


async def test_server_cannot_be_woken_up(serve: Serve) -> None:
    async with serve() as (driver, _, _):
        with pytest.raises(EngineError, match="woken up by who had it sleep"):
            await driver.wake(LONG)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_pause_mode(serve: Serve, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv(module.PAUSE_MODE, mode)
    async with serve() as (driver, server, _):
        await driver.pause(1, LONG)
        assert f"/pause?mode={mode}&clear_cache=false" in server.calls


@pytest.mark.parametrize(
    ("cache", "calls"),
    [
        ("recompute", ["/reset_prefix_cache?reset_running_requests=true", "/resume"]),
        ("reset", ["/reset_prefix_cache?reset_running_requests=false", "/resume"]),
        ("keep", ["/resume"]),
    ],
)
async def test_cache_policy(serve: Serve, monkeypatch: pytest.MonkeyPatch, cache: str, calls: list[str]) -> None:
    monkeypatch.setenv(module.CACHE, cache)
    async with serve() as (driver, server, _):
        await driver.resume(1, VERSION, LONG)
        assert [call for call in server.calls if call.startswith("/") and call != "/is_paused"] == calls


async def test_cache_is_reset_once_in_a_round_and_by_whoever_resumes_a_server_of_another_s_round(serve: Serve) -> None:
    async with serve() as (driver, server, _):
        reset = "/reset_prefix_cache?reset_running_requests=true"
        await round_of(driver)
        assert server.calls.count(reset) == 1
        await driver.pause(2, LONG)
        await driver.abort(2, "no", LONG)
        await driver.resume(2, VERSION, LONG)
        assert server.calls.count(reset) == 2


@pytest.mark.parametrize("name", [module.PAUSE_MODE, module.CACHE])
async def test_setting_that_is_not_known_is_noticed_before_a_pause(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "sometimes")
    async with serve() as (driver, server, _):
        with pytest.raises(EngineError, match=f"{name} is 'sometimes'; it may be"):
            await driver.check(1, LONG)
        assert server.calls == []


async def test_setting_that_is_not_known(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.PAUSE_MODE, "sometimes")
    monkeypatch.setenv(module.CACHE, "sometimes")
    async with serve() as (driver, _, _):
        with pytest.raises(EngineError, match=r"PAUSE_MODE is 'sometimes'; it may be keep, wait, abort$"):
            await driver.pause(1, LONG)
        with pytest.raises(EngineError, match=r"CACHE is 'sometimes'; it may be recompute, reset, keep$"):
            await driver.resume(1, VERSION, LONG)


# --- https -----------------------------------------------------------------------------------------------------------


async def test_https_with_an_authority_of_ones_own(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = runtime_dir / "cert.pem", runtime_dir / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(lambda: subprocess.run(command, check=True, capture_output=True))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = FakeServer("")
    runner = web.AppRunner(server.app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        workers = FakeWorkers(server, f"https://127.0.0.1:{runner.addresses[0][1]}")
        with pytest.raises(PeerLostError, match="certificate verify failed"):
            await VllmDriver("v", workers).check(1, LONG)
        monkeypatch.setenv(module.CA_FILE, str(certificate))
        await VllmDriver("v", workers).check(1, LONG)
    finally:
        await runner.cleanup()
    assert server.calls == ["/is_paused", "check"]


async def test_authority_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.CA_FILE, "/nowhere/ca.pem")
    workers = FakeWorkers(FakeServer(""), "https://127.0.0.1:1")
    with pytest.raises(EngineError, match=r"CPE_VLLM_CA_FILE: /nowhere/ca\.pem cannot be used"):
        await VllmDriver("v", workers).check(1, LONG)

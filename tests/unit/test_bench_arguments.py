"""What the benchmarks refuse at their command lines, and when they do not believe themselves."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus

import pytest

from benchmarks import ingest, push_observability
from benchmarks.push_observability import Scraper
from cpe_daemon.errors import ConfigError


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_number_of_versions_is_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ingest.main(["--transport", "landing", "--versions", number])
    assert ended.value.code == 2
    assert f"invalid positive value: '{number}'" in capsys.readouterr().err


@pytest.fixture
def serve(no_leaks: None) -> Iterator[Callable[[HTTPStatus], str]]:
    """Answer every request with a status."""
    servers: list[tuple[http.server.HTTPServer, threading.Thread]] = []

    def started(status: HTTPStatus) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"metrics")

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield started
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_observability, "_EVERY_SECONDS", 0.001)


def test_scraper_counts_what_was_answered(serve: Callable[[HTTPStatus], str]) -> None:
    with Scraper(serve(HTTPStatus.OK)) as scraper:
        scraper.once()
    assert scraper.count >= 1


def test_scraper_that_is_not_answered_says_so_at_its_end(serve: Callable[[HTTPStatus], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for url, why in ((serve(HTTPStatus.INTERNAL_SERVER_ERROR), "status 500"), (nobody, "refused")):
        scraper = Scraper(url)
        with pytest.raises(ConfigError, match=f"scraping failed after 0 times.*{why}"), scraper:
            scraper._thread.join(20)


def test_scraper_leaves_another_error_as_it_is(serve: Callable[[HTTPStatus], str]) -> None:
    def fail() -> None:
        with Scraper(serve(HTTPStatus.NOT_FOUND)) as scraper:
            scraper._thread.join(20)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

"""A Prometheus server for tests, and what is asked of it over its HTTP API."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests.integration.processes import ROOT, until
from tests.programs import program

DEPLOY = ROOT / "deploy"
_SECONDS = 30.0


class Prometheus:
    """Scrapes one daemon as deploy/prometheus/scrape.yml says, only more often.

    Args:
        target: the daemon's host and port.
        directory: where its configuration and data go.
    """

    def __init__(self, target: str, directory: Path) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "scrape.yml").read_text())
        config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        directory.mkdir()
        file, self._log = directory / "prometheus.yml", directory / "log"
        file.write_text(yaml.safe_dump(config))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={file}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Prometheus:
        try:
            listening = re.compile(r'Listening on" address=(\S+)')
            address = until(lambda: listening.findall(self._log.read_text()), "Prometheus listens")[0]
            self._url = f"http://{address}/api/v1/"
            until(lambda: "ready to receive web requests" in self._log.read_text(), "Prometheus is ready")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(_SECONDS)

    def ask(self, path: str, **terms: str) -> Any:
        """What its API answers."""
        with urlopen(f"{self._url}{path}?{urlencode(terms)}", timeout=_SECONDS) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression, now."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def await_rise(self, counter: str) -> None:
        """Wait until a counter has been seen to rise."""
        until(lambda: self.query(f"rate({counter}[5m]) > 0"), f"{counter} rises")

    def await_value(self, expression: str, value: float) -> None:
        """Wait until an expression has one sample of that value."""
        until(lambda: [float(sample["value"][1]) for sample in self.query(expression)] == [value], expression)

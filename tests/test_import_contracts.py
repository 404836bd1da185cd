"""Each import contract of pyproject.toml catches the import it is there for, and only that contract does.

The contracts run, as `make check` runs them, over a skeleton: the rooms as empty modules, with one forbidden
import planted. So a contract is proven even for a room that nobody has built yet.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent / "pyproject.toml"

SEPARATOR = "=== tree ==="
LINT_EACH = f"""
import os, sys
from importlinter.cli import lint_imports
for root in sys.argv[1:]:
    os.chdir(root)
    print({SEPARATOR!r}, flush=True)
    lint_imports(no_cache=True, no_logo=True)
"""

SKELETON = """
cpe_daemon/__init__.py
cpe_daemon/__main__.py
cpe_daemon/arena.py
cpe_daemon/cli/__init__.py
cpe_daemon/config.py
cpe_daemon/core/__init__.py
cpe_daemon/daemon/__init__.py
cpe_daemon/daemon/bootstrap.py
cpe_daemon/demo/__init__.py
cpe_daemon/devices/__init__.py
cpe_daemon/devices/cuda/__init__.py
cpe_daemon/devices/cuda/device.py
cpe_daemon/devices/shm.py
cpe_daemon/doctor/__init__.py
cpe_daemon/engines/__init__.py
cpe_daemon/errors.py
cpe_daemon/ingest/__init__.py
cpe_daemon/journal.py
cpe_daemon/links/__init__.py
cpe_daemon/observe/__init__.py
cpe_daemon/peers/__init__.py
cpe_daemon/publisher/__init__.py
cpe_daemon/push/__init__.py
cpe_daemon/readiness.py
cpe_daemon/readings.py
cpe_daemon/runtime.py
cpe_daemon/statefile.py
cpe_daemon/status.py
cpe_daemon/transports/__init__.py
cpe_daemon/transports/loopback.py
cpe_daemon/transports/mooncake.py
cpe_daemon/version.py
cpe_daemon/versions.py
cpe_daemon/wire/__init__.py
inference_plugins/__init__.py
inference_plugins/torch/__init__.py
inference_plugins/torch/driver.py
inference_plugins/torch/worker.py
"""

LAYERS = "Rooms form layers"
PURE = "Core and wire are pure"
DEVICES = "Concrete devices are named by the daemon, the publisher and worker halves"
LOWER_ROOMS = "Publisher and plugins use the lower rooms only"
LEAN = "Publisher and plugins need only torch, pyzmq, msgspec, safetensors and xxhash"
NO_PLUGIN = "The daemon imports no engine plugin"
ROOT = "The root package imports nothing"

# contract -> planted imports: "importer: imported", several for a chain
PLANTED = [
    (LAYERS, ["cpe_daemon.errors: cpe_daemon.core"]),
    (LAYERS, ["cpe_daemon.core: cpe_daemon.wire"]),
    (LAYERS, ["cpe_daemon.observe: cpe_daemon.config"]),
    (LAYERS, ["cpe_daemon.push: cpe_daemon.ingest"]),
    (LAYERS, ["cpe_daemon.readings: cpe_daemon.status"]),
    (LAYERS, ["cpe_daemon.push: cpe_daemon.journal"]),
    (LAYERS, ["cpe_daemon.devices: cpe_daemon.statefile"]),
    (LAYERS, ["cpe_daemon.versions: cpe_daemon.push"]),
    (LAYERS, ["cpe_daemon.version: cpe_daemon.versions"]),
    (LAYERS, ["cpe_daemon.arena: cpe_daemon.engines"]),
    (LAYERS, ["cpe_daemon.links: cpe_daemon.devices"]),
    (LAYERS, ["cpe_daemon.daemon: cpe_daemon.cli"]),
    (LAYERS, ["cpe_daemon.doctor: cpe_daemon.demo"]),
    (LAYERS, ["cpe_daemon.daemon: cpe_daemon.publisher"]),
    (LAYERS, ["cpe_daemon.homeless: cpe_daemon.errors"]),
    (PURE, ["cpe_daemon.core: time"]),
    (PURE, ["cpe_daemon.core: os.path"]),
    (PURE, ["cpe_daemon.wire: zmq"]),
    (PURE, ["cpe_daemon.wire: torch"]),
    (DEVICES, ["cpe_daemon.push: cpe_daemon.devices.shm"]),
    (DEVICES, ["cpe_daemon.engines: cpe_daemon.devices.shm"]),
    (DEVICES, ["cpe_daemon.push: cpe_daemon.devices.cuda.device"]),
    (LOWER_ROOMS, ["cpe_daemon.publisher: cpe_daemon.config"]),
    (LOWER_ROOMS, ["inference_plugins.torch.driver: cpe_daemon.engines"]),
    (
        LOWER_ROOMS,
        ["inference_plugins.torch.worker: cpe_daemon.links", "cpe_daemon.links: cpe_daemon.observe"],
    ),
    (LOWER_ROOMS, ["inference_plugins: cpe_daemon.publisher"]),
    (LEAN, ["cpe_daemon.publisher: cpe_daemon.links", "cpe_daemon.links: structlog"]),
    (LEAN, ["inference_plugins.torch.worker: pydantic"]),
    (NO_PLUGIN, ["cpe_daemon.daemon: inference_plugins.torch.driver"]),
    (ROOT, ["cpe_daemon: cpe_daemon.publisher"]),
]

ALLOWED = [
    "cpe_daemon.cli: cpe_daemon.daemon",
    "cpe_daemon.cli: cpe_daemon.doctor",
    "cpe_daemon.daemon.bootstrap: cpe_daemon.publisher",
    "cpe_daemon.daemon: cpe_daemon.transports.mooncake",
    "cpe_daemon.daemon: cpe_daemon.devices.shm",
    "cpe_daemon.demo: inference_plugins.torch.worker",
    "cpe_daemon.doctor: cpe_daemon.config",
    "cpe_daemon.ingest: cpe_daemon.versions",
    "cpe_daemon.push: cpe_daemon.devices",
    "cpe_daemon.peers: cpe_daemon.transports",
    "cpe_daemon.publisher: cpe_daemon.devices.shm",
    "cpe_daemon.publisher: cpe_daemon.links",
    "cpe_daemon.wire: msgspec",
    "inference_plugins.torch.worker: cpe_daemon.devices.shm",
    "inference_plugins.torch.worker: torch",
]


def plant(root: Path, imports: Iterable[str]) -> None:
    """Build the skeleton under `root`, with `imports` in it and the project's own contracts beside it."""
    (root / "pyproject.toml").write_text(PROJECT.read_text())
    for name in SKELETON.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for line in imports:
        importer, imported = line.split(": ")
        place = root / importer.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        with file.open("a") as source:
            source.write(f"import {imported}\n")


@pytest.fixture(scope="module")
def broken_contracts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], set[str]]:
    """Which contracts each planted list of imports breaks.

    One process lints all the trees in turn: starting the linter takes ten times as long as linting one.
    """
    plants = [tuple(imports) for _, imports in PLANTED] + [tuple(ALLOWED)]
    roots = [tmp_path_factory.mktemp(f"tree{number}-") for number in range(len(plants))]
    for root, imports in zip(roots, plants, strict=True):
        plant(root, imports)
    run = subprocess.run(
        [sys.executable, "-c", LINT_EACH, *roots],
        cwd=roots[0],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    outputs = run.stdout.split(SEPARATOR)[1:]
    assert len(outputs) == len(plants), run.stdout + run.stderr
    return {imports: verdicts_in(output) for imports, output in zip(plants, outputs, strict=True)}


def verdicts_in(output: str) -> set[str]:
    """The names of the broken contracts in one run's output, which must have a verdict for every contract."""
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)\b", output, flags=re.MULTILINE))
    assert set(verdicts) == contract_names(), output
    return {name for name, verdict in verdicts.items() if verdict == "BROKEN"}


def contract_names() -> set[str]:
    contracts = tomllib.loads(PROJECT.read_text())["tool"]["importlinter"]["contracts"]
    return {contract["name"] for contract in contracts}


def test_every_contract_has_a_planted_violation() -> None:
    assert {contract for contract, _ in PLANTED} == contract_names()


def test_contracts_keep_what_the_design_allows(broken_contracts: dict[tuple[str, ...], set[str]]) -> None:
    assert broken_contracts[tuple(ALLOWED)] == set()


@pytest.mark.parametrize(("contract", "imports"), PLANTED, ids=[" ".join(imports) for _, imports in PLANTED])
def test_contract_breaks_alone_on(
    contract: str, imports: list[str], broken_contracts: dict[tuple[str, ...], set[str]]
) -> None:
    assert broken_contracts[tuple(imports)] == {contract}

"""The documents say what is there: generated parts are current, and commands, settings, files and links exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from cpe_daemon.cli import main
from cpe_daemon.config.model import IngestConfig, settings
from cpe_daemon.core.roles import Role
from cpe_daemon.links.access import ROLES
from cpe_daemon.wire.messages import (
    MOST_CHUNK_FRAMES,
    EngineAdd,
    EngineRemove,
    EvictRequest,
    Message,
    PushRequest,
    RollbackRequest,
    StatusRequest,
    WaitRequest,
)

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
OURS = ("cpe_daemon/", "inference_plugins/", "tests/", "configs/", "deploy/", "examples/", "docs/")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document", ["ARCHITECTURE.md", "docs/DEADLINES.md", "docs/METRICS.md", "configs/default.yaml"]
)
def test_generated_document_is_current(document: str) -> None:
    made = generator().DOCUMENTS[ROOT / document]()
    assert made == (ROOT / document).read_text(), "run `make docs`"


def test_generator_refuses_a_document_without_a_place() -> None:
    with pytest.raises(ValueError, match="no place for the version diagram"):
        generator().generated("# Empty\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_that_a_document_names_exist(document: Path) -> None:
    named = [name for name in re.findall(r"`([\w./-]+)`", document.read_text()) if name.startswith(OURS)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file) if file else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_readme_lists_every_command() -> None:
    listed = re.findall(r"^\| `cpe (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == list(main.commands)


def test_readme_names_settings_that_exist() -> None:
    names = {".".join(path) for path in settings()}
    sections = {name.partition(".")[0] for name in names}
    named = re.findall(r"`([a-z_]+\.[a-z_]+)[`:=]", (ROOT / "README.md").read_text())
    assert named
    assert [name for name in named if name.partition(".")[0] in sections and name not in names] == []


def test_architecture_lists_every_room() -> None:
    rooms = {path.stem for path in (ROOT / "cpe_daemon").iterdir() if not path.name.startswith("_")} - {"py"}
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("| layer |")[2].partition("\n\n")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == rooms


def test_security_states_the_limits_that_hold() -> None:
    text, ingest = (ROOT / "docs" / "SECURITY.md").read_text(), IngestConfig()
    assert f"| frames of a message | {1 + MOST_CHUNK_FRAMES} of a trainer or operator" in text
    assert f"bounded by their credits, {ingest.credits * ingest.chunk_bytes >> 20} MiB by default" in text
    assert f"| messages of a client in a second | {ingest.messages_per_second:,};" in text
    assert f"tensors of a rank | {ingest.max_trainers}, 4, {ingest.max_tensors:,} |" in text


def test_security_says_all_that_an_operator_may() -> None:
    words: dict[type[Message], str] = {
        StatusRequest: "read the status",
        PushRequest: "push versions",
        RollbackRequest: "roll back",
        WaitRequest: "wait for versions",
        EvictRequest: "let go of versions",
        EngineAdd: "expect and",
        EngineRemove: "forget engines",
    }
    assert words.keys() == {message for message, roles in ROLES.items() if Role.OPERATOR in roles}
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    (may,) = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `operator` |")]
    assert [said for said in words.values() if said not in may] == []


def test_operations_states_what_rings_and_chunks_take() -> None:
    text, ingest = (ROOT / "docs" / "OPERATIONS.md").read_text(), IngestConfig()
    of_ring = f"`ingest.landing_chunk_bytes` | {ingest.landing_credits * ingest.landing_chunk_bytes >> 20} MiB |"
    of_chunks = f"`ingest.chunk_bytes` | {ingest.credits * ingest.chunk_bytes >> 20} MiB |"
    assert of_ring in text
    assert of_chunks in text

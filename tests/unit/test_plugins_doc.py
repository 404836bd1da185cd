"""docs/PLUGINS.md: what it shows runs, and what it lists is all there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inference_plugins.loader import Loader
from inference_plugins.testing import SCENARIOS
from tests.unit.fake_node import FakeNode, number
from tests.unit.test_conformance import example

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "PLUGINS.md").read_text()


@pytest.mark.parametrize("name", ["tiny_plugin.py", "tiny_conformance.py"])
def test_page_shows_the_example_as_it_is(name: str) -> None:
    assert f"```python\n{(ROOT / 'examples' / name).read_text()}```\n" in PAGE


def test_example_of_the_kit_runs() -> None:
    ran = subprocess.run(
        [sys.executable, "examples/tiny_conformance.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == [scenario.name for scenario in SCENARIOS]
    assert ran.stdout.count(" passed\n") == len(SCENARIOS) - 1


def test_page_lists_every_scenario() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    scenarios = [(scenario.name, scenario.about) for scenario in SCENARIOS]
    assert [row for row in rows if row[0] in dict(scenarios)] == scenarios


def test_page_has_every_method_of_a_loader() -> None:
    methods = {name for name in vars(Loader) if not name.startswith("_")}
    assert {name for name in methods if f"`{name}`" not in PAGE} == set()


async def test_driver_of_the_example_takes_an_engine_through_rounds() -> None:
    async with FakeNode.running() as node:
        node.drivers["tiny"] = example("tiny_plugin").TinyDriver
        worker = node.worker("e", kind="tiny")
        record = await node.publish(number(1))
        assert (record.state, worker.content) == ("live", number(1))
        worker.fail("load")
        assert (await node.publish(number(2))).state == "failed"
        assert worker.steps[-2:] == ["abort", "resume"]

"""The planning benchmark: its last line says what it measured, and its check finds what is wrong with a plan."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kimi
from benchmarks.plan import Case, make_case
from benchmarks.plan_check import Checker, WrongPlanError
from cpe_daemon.core.copies import PeerCopy
from cpe_daemon.core.plan import Bucket, Copy, Part, Plan, Topology, assign, cut
from tests.unit.model_names import tensors_of

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("more", [[], ["--spread", "tensors", "--numa-nodes", "2"], ["--ranks", "1"]])
def test_last_line_says_what_was_planned_and_how_long_it_took(more: list[str]) -> None:
    done = benchmark("--model", "kimi-k2", "--quick", *more)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(last)
    assert result["bench"] == "plan"
    assert result["tensors"] == len(kimi.tensors(3)) == 4675
    assert result["ranks"] == (1 if "--ranks" in more else 16)
    assert len(result["seconds"]) == len(result["validate_seconds"]) == 2
    assert all(seconds > 0 for seconds in result["seconds"])
    assert any("validate" in line for line in table)


def test_help_names_the_keys_and_gives_examples() -> None:
    done = benchmark("--help")
    assert done.returncode == 0
    for word in ("python -m benchmarks.plan --model kimi-k2", "validate_seconds", "experts ", "tensors "):
        assert word in done.stdout


def test_impossible_numbers_are_refused() -> None:
    done = benchmark("--quick", "--ranks", "0")
    assert done.returncode == 2
    assert "take 1 or more" in done.stderr


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    assert set(kimi.tensors()) == set(tensors_of("Kimi-K2"))


@pytest.mark.parametrize("spread", sorted(kimi.SPREADS))
def test_every_tensor_is_contributed_by_one_rank_and_every_rank_contributes(spread: str) -> None:
    specs = kimi.tensors(2)
    shares = kimi.SPREADS[spread](specs, 16)
    assert all(shares)
    assert sorted(shard.name for share in shares for shard in share) == sorted(spec.name for spec in specs)


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> Case:
    """Three GPUs, and slots so small that tensors are split."""
    return make_case(layers=2, ranks=3, spread="experts", slot_bytes=16 * MIB, numa_nodes=1)


def plan_of(case: Case, *, peer_access: bool = True) -> Plan:
    tensors = case.manifest.tensors
    topology = Topology(case.topology.gpus, peer_access)
    return assign(cut([tensor.spec for tensor in tensors], case.slot_bytes), tensors, case.bases, topology)


def check(case: Case, plan: Plan) -> int:
    return Checker(plan, case.manifest.tensors, case.bases).check()


@pytest.mark.parametrize("peer_access", [False, True])
def test_a_good_plan_passes(case: Case, peer_access: bool) -> None:
    assert check(case, plan_of(case, peer_access=peer_access)) == case.manifest.nbytes


def first(items: tuple[Any, ...], change: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    return (*change(items[0]), *items[1:])


def moved(copy: Copy, bytes_: int) -> Copy:
    return Copy(copy.origin, copy.address + bytes_, copy.slot_offset, copy.nbytes)


def shorter(copy: Copy) -> Copy:
    return Copy(copy.origin, copy.address, copy.slot_offset, copy.nbytes - 1)


def pulls_changed(change: Callable[[tuple[Copy, ...]], tuple[Copy, ...]]) -> Callable[[Bucket], Bucket]:
    return lambda bucket: replace(bucket, pulls=first(bucket.pulls, lambda pulls: (change(pulls),)))


def exchanges_changed(change: Callable[[tuple[PeerCopy, ...]], tuple[PeerCopy, ...]]) -> Callable[[Bucket], Bucket]:
    return lambda bucket: replace(bucket, exchanges=first(bucket.exchanges, lambda copies: (change(copies),)))


def parts_changed(change: Callable[[Part], tuple[Part, ...]]) -> Callable[[Bucket], Bucket]:
    return lambda bucket: replace(bucket, parts=first(bucket.parts, change))


WRONG: dict[str, Callable[[Bucket], Bucket]] = {
    "a pull from elsewhere": pulls_changed(lambda pulls: first(pulls, lambda copy: (moved(copy, 256),))),
    "a pull that is missing": pulls_changed(lambda pulls: pulls[1:]),
    "a pull twice": pulls_changed(lambda pulls: (pulls[0], *pulls)),
    "a pull without its last byte": pulls_changed(lambda pulls: first(pulls, lambda copy: (shorter(copy),))),
    "a pull by another GPU": lambda bucket: replace(bucket, pulls=bucket.pulls[1:] + bucket.pulls[:1]),
    "an exchange that is missing": exchanges_changed(lambda copies: copies[1:]),
    "an exchange twice": exchanges_changed(lambda copies: (copies[0], *copies)),
    "an exchange with oneself": exchanges_changed(lambda copies: (*copies, PeerCopy(0, 0, 256))),
    "an exchange with the wrong GPU": exchanges_changed(
        lambda copies: first(copies, lambda copy: (PeerCopy(2, copy.slot_offset, copy.nbytes),))
    ),
    "a part that is missing": parts_changed(lambda part: ()),
    "a part twice": parts_changed(lambda part: (part, part)),
    "a part elsewhere in the slot": parts_changed(
        lambda part: (Part(part.tensor, part.tensor_offset, part.nbytes, part.slot_offset + 256),)
    ),
    "a bucket beyond its slot": lambda bucket: replace(bucket, nbytes=17 * MIB),
}


@pytest.mark.parametrize("where", ["first", "middle"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_is_found(case: Case, wrong: str, where: str) -> None:
    plan = plan_of(case)
    at = 0 if where == "first" else len(plan.buckets) // 2
    changed = WRONG[wrong](plan.buckets[at])
    assert changed != plan.buckets[at]
    with pytest.raises(WrongPlanError):
        check(case, replace(plan, buckets=(*plan.buckets[:at], changed, *plan.buckets[at + 1 :])))


def test_a_plan_that_lacks_a_bucket_is_found(case: Case) -> None:
    plan = plan_of(case)
    with pytest.raises(WrongPlanError):
        check(case, replace(plan, buckets=plan.buckets[:-1]))

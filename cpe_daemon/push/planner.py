"""Plans rounds, and remembers how the tensors of each model were cut: most versions have those of the one before.

What workers need of the tensors is remembered with the cut, bucket by bucket, for as long as they need the same; and,
where that is little, the last plans: versions come to the same places of the arena again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog

from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.needs import Needs, by_name, schema_of
from cpe_daemon.core.plan import Base, Costs, Cut, Plan, Topology, Wants, assign, cut
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import MisuseError

log = structlog.get_logger(__name__)

_REMEMBERED: Final = 8
"""Models: their names are trainers' to choose, and the tensors of a large one take tens of megabytes."""
_PLANS: Final = 4
"""Of a model; as many as it may have versions here, as a rule."""
FEW_TENSORS: Final = 1000
"""A plan of so many takes a megabyte or less, and a millisecond."""


class _Made(NamedTuple):
    """A plan, and all that it follows from."""

    tensors: Sequence[Tensor]
    bases: Sequence[Base]
    topology: Topology
    wants: Wants | None
    plan: Plan

    def follows_from(
        self, tensors: Sequence[Tensor], bases: Sequence[Base], topology: Topology, wants: Wants | None
    ) -> bool:
        """Whether these would lead to it again."""
        where = self.wants is wants and self.bases == bases and self.topology == topology
        return where and self.tensors == tensors


@dataclass
class _Known:
    """A model's tensors, and what was made of them."""

    specs: list[TensorSpec]
    cut: Cut
    order: list[int] | None = None
    """Indexes of the tensors in the order of their names; None: nobody asked yet."""
    schema: str = ""
    wants: Wants | None = None
    wanted: object = None
    """Which needs, of workers of how many GPUs, these are."""
    made: list[_Made] = field(default_factory=list)
    """The last plans."""

    def sort(self) -> list[int]:
        """Say the tensors' order, and their digest with it."""
        if self.order is None:
            self.order = by_name(self.specs)
            self.schema = schema_of([self.specs[index] for index in self.order])
        return self.order


class Planner:
    """Makes one plan at a time, in any thread.

    Args:
        slot_bytes: size of a slot.
    """

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._cuts: OrderedDict[str, _Known] = OrderedDict()
        """By model, the one planned last at the end."""

    def plan(
        self,
        model: str,
        tensors: Sequence[Tensor],
        bases: Sequence[Base],
        topology: Topology,
        needs: Sequence[Sequence[Needs | None]] = (),
    ) -> tuple[Sequence[TensorSpec], Plan, str]:
        """Plan a push of a model's tensors; takes tenths of a second for 140,000.

        Args:
            model: whose tensors they are.
            tensors: a manifest's.
            bases: by rank of that manifest, where its extent begins.
            topology: the GPUs.
            needs: by GPU, what each of its workers said that it needs, of whatever tensors; None: everything.

        Returns:
            What the tensors are, the same object as long as they are the same, the plan, and the schema of the needs
            that it goes by; "" if it goes by none.

        Raises:
            MisuseError: the tensors are not covered by their runs.
        """
        specs = [tensor.spec for tensor in tensors]
        known = self._cuts.get(model)
        if known is None or known.specs != specs:
            known = self._cuts[model] = _Known(specs, cut(specs, self._slot_bytes))
        self._cuts.move_to_end(model)
        while len(self._cuts) > _REMEMBERED:
            self._cuts.popitem(last=False)
        wants = self._want(known, needs, topology.costs)
        plan = self._assign(known, tensors, bases, topology, wants)
        return known.specs, plan, known.schema if wants is not None else ""

    def _assign(
        self,
        known: _Known,
        tensors: Sequence[Tensor],
        bases: Sequence[Base],
        topology: Topology,
        wants: Wants | None,
    ) -> Plan:
        for made in known.made:
            if made.follows_from(tensors, bases, topology, wants):
                return made.plan
        plan = assign(known.cut, tensors, bases, topology, wants)
        if len(tensors) <= FEW_TENSORS:
            known.made = [*known.made[1 - _PLANS :], _Made(tensors, bases, topology, wants, plan)]
        return plan

    def _want(self, known: _Known, needs: Sequence[Sequence[Needs | None]], costs: Costs) -> Wants | None:
        """What is needed of a model's buckets; None if that is everything."""
        if not any(one for several in needs for one in several):
            return None
        order = known.sort()
        fitting = [[one if one and one.schema == known.schema else None for one in several] for several in needs]
        wanted = [sorted({one.digest if one else "" for one in several}) for several in fitting]
        if not any(digest for digests in wanted for digest in digests):
            return None
        if known.wanted != (wanted, costs):
            known.wanted, known.wants = (wanted, costs), None
            try:
                known.wants = Wants(known.cut, order, fitting, costs)
            except MisuseError as error:  # a worker's fault: it is sent everything, as are the others
                log.warning("needs.not_understood", error=error.message)
        return known.wants

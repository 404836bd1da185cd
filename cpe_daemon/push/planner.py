"""Plans rounds, and remembers how the tensors of each model were cut: most versions have those of the one before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.plan import Base, Cut, Plan, Topology, assign, cut
from cpe_daemon.core.types import TensorSpec

_REMEMBERED: Final = 8
"""Models: their names are trainers' to choose, and the tensors of a large one take tens of megabytes."""


class Planner:
    """Makes one plan at a time, in any thread.

    Args:
        slot_bytes: size of a slot.
    """

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._cuts: OrderedDict[str, tuple[list[TensorSpec], Cut]] = OrderedDict()
        """By model, the one planned last at the end."""

    def plan(
        self, model: str, tensors: Sequence[Tensor], bases: Sequence[Base], topology: Topology
    ) -> tuple[Sequence[TensorSpec], Plan]:
        """Plan a push of a model's tensors; takes tenths of a second for 140,000.

        Args:
            model: whose tensors they are.
            tensors: a manifest's.
            bases: by rank of that manifest, where its extent begins.
            topology: the GPUs.

        Returns:
            What the tensors are, the same object as long as they are the same, and the plan.

        Raises:
            MisuseError: the tensors are not covered by their runs.
        """
        specs = [tensor.spec for tensor in tensors]
        known, made = self._cuts.get(model, (None, None))
        if made is None or known is None or known != specs:
            made = cut(specs, self._slot_bytes)
            known = specs
            self._cuts[model] = (known, made)
        self._cuts.move_to_end(model)
        while len(self._cuts) > _REMEMBERED:
            self._cuts.popitem(last=False)
        return known, assign(made, tensors, bases, topology)

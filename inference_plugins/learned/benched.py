"""The modules whose tensors are copied to benches, in the rounds after that was learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cpe_daemon.errors import EngineError
from inference_plugins.assembly import Placement
from inference_plugins.learned.benches import Benches, Form, form_of
from inference_plugins.learned.record import Move
from inference_plugins.learned.table import placement


class Benched:
    """The modules whose tensors are copied to benches: which of these there are in this round, and what is to come.

    Args:
        benches: the engine's.
    """

    def __init__(self, benches: Benches) -> None:
        self._benches = benches
        self._forms: Mapping[str, Mapping[str, Form]] = {}
        self._moves: Mapping[str, Sequence[Move]] = {}
        self._modules: dict[str, list[str]] = {}
        """By tensor: those of its modules that are made over."""
        self._tensors: dict[str, list[str]] = {}
        """By module that is made over."""
        self._addresses: dict[tuple[str, bool], int] = {}
        """By parameter, and whether that is the one on a bench: where it is, or was last."""
        self._places: dict[str, Placement] = {}
        """By tensor: where it goes, as long as benches are where they were."""
        self._begun: list[str] = []
        """Tensors that began to come since modules were last made over."""
        self._missing = dict[str, int]()
        """By module that has a bench: how many tensors are still to come."""

    def learn(
        self,
        forms: Mapping[str, Mapping[str, Form]],
        moves: Mapping[str, Sequence[Move]],
        modules: Mapping[str, Iterable[str]],
        addresses: Mapping[str, int],
    ) -> None:
        """Take what was learned.

        Args:
            forms: by module that has a bench, those of that bench's tensors.
            moves: by tensor, where it goes.
            modules: by tensor, all modules that it goes to.
            addresses: of parameters that are on no bench.
        """
        self._forms, self._moves = forms, moves
        self._addresses = {(name, False): address for name, address in addresses.items()}
        found = {tensor: [module for module in its if module in forms] for tensor, its in modules.items()}
        self._modules = {tensor: its for tensor, its in found.items() if its}
        self._tensors, self._places = {}, {}
        for tensor, its in self._modules.items():
            for module in its:
                self._tensors.setdefault(module, []).append(tensor)

    def begin(self) -> None:
        """A round begins; whatever benches there were are gone."""
        self._begun.clear()
        self._missing.clear()

    def __contains__(self, tensor: object) -> bool:
        """Whether a module that a tensor goes to is made over."""
        return tensor in self._modules

    def place(self, tensor: str) -> Placement:
        """Say where a tensor goes that begins to come, for the first time in this round.

        Raises:
            EngineError: a bench has another form than it had; all has to be learned anew.
        """
        for module in self._modules[tensor]:
            if module not in self._missing:
                self._lay_out(module)
        self._begun.append(tensor)
        place = self._places.get(tensor)
        if place is None:
            rectangles = (
                move.rectangle.moved(self._addresses[move.parameter, move.bench], 0) for move in self._moves[tensor]
            )
            place = self._places[tensor] = placement(tuple(rectangles))
        return place

    def _lay_out(self, module: str) -> None:
        bench = self._benches.lay_out(module)
        if {name: form_of(made) for name, made in bench.items()} != self._forms[module]:
            raise EngineError(f"what is made over for {module} has another form than it had")
        self._missing[module] = len(self._tensors[module])
        addresses = {(name, True): made.data_ptr() for name, made in bench.items()}
        if not addresses.items() <= self._addresses.items():
            self._addresses |= addresses
            for tensor in self._tensors[module]:
                self._places.pop(tensor, None)

    def make_over(self) -> None:
        """Make over what is whole, for all of what began to come has come; copies to GPUs were issued at least."""
        begun, self._begun = self._begun, []
        for tensor in begun:
            for module in self._modules[tensor]:
                self._missing[module] -= 1
                if not self._missing[module]:
                    self._benches.make_over(module)
                    del self._missing[module]

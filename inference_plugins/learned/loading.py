"""One engine's loader, learned from its own loads, for as long as its parameters and what comes stay what they are."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import Final

import torch
from torch.autograd.graph import increment_version

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import EngineError
from inference_plugins.assembly import Placement
from inference_plugins.learned.aside import unwatched
from inference_plugins.learned.benched import Benched
from inference_plugins.learned.benches import Benches, Filled, Form, NoBenches, module_of
from inference_plugins.learned.comparison import Comparison
from inference_plugins.learned.needs import Learned, Needed, needed
from inference_plugins.learned.provenance import layout_of
from inference_plugins.learned.record import Move
from inference_plugins.learned.table import Entry, Report, Table, placement
from inference_plugins.learned.watch import Watch, warm_up

log: Final = logging.getLogger(__name__)

_WATCHING_SECONDS: Final = 60.0
"""How long the loader may be watched in a round: one that takes longer is not learned, for deadlines' sake."""

Parameters = Callable[[], Mapping[str, torch.Tensor]]


class LearnedLoading:
    """Where a loader puts tensors, as it was seen to do.

    In every round, in this order: `begin`; `place` for the tensors of each bucket; `observe` for those that have no
    place; `finish`. A round that ends otherwise teaches nothing. Belongs to the receiver's thread, but for `forget`.

    A tensor's place is used when nothing but copies of its bytes was seen, no other tensor of its modules is treated
    in another way, no byte is written by two tensors, and at every place bytes were seen to arrive, of contents that
    would have shown another order. Everything else stays with the loader, which then is given whole modules. What
    changes in parameters without having been seen to be written, as by a thread of the loader's own, ends all trust.

    Args:
        parameters: returns all that the loader writes to, by name; called in every round. They keep their memory from
            one round to the next, or all is learned anew.
        module_of: by which parameters belong together, and are loaded in the same way.
        on: False learns nothing, and has no places.
        benches: the engine's, if it makes other tensors of what was loaded.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        module_of: Callable[[str], str] = module_of,
        on: bool = True,
        benches: Benches | None = None,
    ) -> None:
        self.on = on
        self.report = Report()
        self._parameters = parameters
        self._module_of = module_of
        self._table = Table(module_of)
        self._layout: dict[str, Hashable] = {}
        self._held: Mapping[str, torch.Tensor] = {}
        self.modules: Set[str] = frozenset()
        """Those all of whose tensors have places."""
        self._ready: dict[str, Learned] = {}
        self._needed: tuple[torch.device, Needed | None] | None = None
        """What `needs` found last, and for which device."""
        self._arrived = set[str]()
        """Tensors that came in this round."""
        self._announced: Sequence[TensorSpec] | None = None
        self._stale = ""
        """Why all has to be learned anew."""
        self._failed = ""
        """Why nothing is to be learned from the next round on."""
        self._watch: Watch | None = None
        self._came: dict[str, TensorSpec] = {}
        """Tensors that were watched in this round."""
        self._came_to = torch.device("cpu")
        """Where they were."""
        self._watched_seconds = 0.0
        """What the loader took while it was watched."""
        self._comparison = Comparison()
        self._benches = benches or NoBenches()
        self._benched = Benched(self._benches)
        if on:
            warm_up()

    @property
    def stale(self) -> str:
        """Why all is to be learned anew from the next round on; "" if it is not."""
        return self._stale

    @property
    def _learning(self) -> bool:
        return self.on and not self._stale and not self._failed

    def forget(self, reason: str) -> None:
        """Learn anew from the next round on: the loader puts things elsewhere from now on. Callable from any thread."""
        self._stale = reason

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """A version of these is announced; a round may follow, or one of another version."""
        self._announced = tensors if self.on else None

    def begin(self) -> None:
        """A round begins."""
        self._benched.begin()
        self.on = self.on and not self._failed
        if not self.on:
            self._drop()
            return
        self._watch, self._came, self._watched_seconds = None, {}, 0.0
        self._arrived.clear()
        self._comparison.begin()
        self._held = dict(self._parameters())
        layout = {name: layout_of(tensor) for name, tensor in self._held.items()}
        if self._table.entries and layout != self._layout:
            self._stale = self._stale or "parameters have other memory"
        if self._table.entries and self._announced is not None and not self._table.fits(self._announced):
            self._stale = self._stale or "a version has other tensors"
        if self._stale:
            self._drop()
        self._layout = layout
        if self._ready:
            increment_version([tensor for tensor in self._held.values() if not tensor.is_inference()])

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> list[Placement | None]:
        """Say where in the memory of ``device`` bytes belong; None: the loader has to be given that tensor.

        Raises:
            EngineError: a bench cannot be made, or not as it was.
        """
        ready = self._ready
        if not ready:
            return [None] * len(tensors)
        places = list[Placement | None]()
        for spec in tensors:
            known = ready.get(spec.name)
            if known is not None and known.spec != spec:
                self._stale, ready = f"{spec.name} has another dtype or shape", {}
                known = None
            here = known is not None and (known.device is None or known.device == device)
            if known is not None and known.benched:
                places.append(self._place_on_benches(spec.name, here=here))
            else:
                places.append(known.place if known is not None and here else None)
        self._arrived.update([spec.name for spec in tensors])
        return places

    def _place_on_benches(self, name: str, *, here: bool) -> Placement:
        """Where a tensor goes of a module that is made over: its loader would write to the tensors of kernels."""
        with self._forgetting():
            if not here:
                raise EngineError(f"{name} comes to another device than it did")
            return self._benched.place(name)

    def make_over(self) -> None:
        """Every byte that was placed has been copied, or that was issued: have the engine make over what is whole."""
        with self._forgetting():
            self._benched.make_over()

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        """If benches fail, the loader is to be given everything in the next round: it may do better."""
        try:
            yield
        except Exception as error:  # task boundary: only noted here, and raised again
            self.forget(f"{type(error).__name__}: {error}")
            raise

    def needs(self, device: torch.device) -> Needed | None:
        """Which bytes of the tensors that were learned are needed of slots on a device; None: all."""
        if self._needed is None or self._needed[0] != device:
            specs = [entry.spec for entry in self._table.entries.values()]
            self._needed = device, needed(specs, self._ready, device) if self._ready else None
        return self._needed[1]

    @property
    def missing(self) -> list[str]:
        """Tensors that are known to go somewhere, and did not come in this round, of modules that no loader sees."""
        return [name for name, known in self._ready.items() if known.device is not None and name not in self._arrived]

    def observe(self, tensors: Sequence[tuple[str, torch.Tensor]], load: Callable[[], object]) -> None:
        """Have ``load`` load tensors, and learn from it.

        Args:
            tensors: whole, and contiguous.
            load: is given them, or slices of them, and has read them when it returns; on a GPU when torch's current
                stream has come this far.
        """
        if not self._learning:
            load()
            return
        new = [(name, spec_of(name, tensor)) for name, tensor in tensors if name not in self._table.entries]
        if new:
            self._watch = self._watch or Watch(self._held, self._module_of)
            self._came.update(new)
            self._came_to = tensors[0][1].device
            began = time.monotonic()
            with self._benches.showing(self._making_over):
                self._watch.run(tensors, load)
            self._watched_seconds += time.monotonic() - began
            if self._watched_seconds > _WATCHING_SECONDS:
                self._failed = f"it took {self._watched_seconds:.0f} s to watch the loader"
        else:
            with self._benches.showing(self._making_over):
                load()
        with self._trying():
            self._comparison.note(tensors, self._table, self._watch)

    def finish(self, work: Callable[[], object] | None = None) -> None:
        """All tensors came, and every device is at rest: have ``work`` do what is left to do, and see what arrived.

        Args:
            work: what the engine does when it has been given everything, if it does anything.
        """
        self.make_over()
        learning = self._learning
        if work is not None:
            with self._benches.showing(self._making_over) if learning else contextlib.nullcontext():
                if self._watch is not None:
                    self._watch.run([], work)
                else:
                    work()
        if not learning:
            return
        with self._trying():
            if self._watch is not None:
                self._enter(self._watch)
            if self._watch is not None or self._comparison.sent:
                judged = self._comparison.judge(self._table, self._held)
                if judged or self._watch is not None:
                    self._use()
        self._watch, self._came = None, {}

    # --- what was seen ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _making_over(self, module: str) -> Iterator[Filled]:
        """The engine makes a module over in it: what its bench held was copied there, if that was seen."""
        watching = contextlib.nullcontext() if self._watch is None else self._watch.making_over(module)
        with watching as watched:

            def filled(bench: Mapping[str, torch.Tensor]) -> None:
                if watched is not None:
                    watched(bench)
                with unwatched(), self._trying():
                    self._comparison.look(bench, self._table.on_bench(module))

            yield filled

    def _enter(self, watch: Watch) -> None:
        """Make a table of what was watched."""
        if watch.in_use:
            gc.collect()  # what is still there then is kept by somebody
        watch.end()
        spoilt = dict(watch.record.spoilt)
        after = self._parameters()
        for name, layout in self._layout.items():
            if name not in after or layout_of(after[name]) != layout:
                spoilt[name] = "replaced"
        for name, spec in self._came.items():
            moves, reason = watch.record.moves.get(name, []), watch.record.trouble.get(name, "")
            if not moves and not reason and name in watch.looked_at:
                reason = "not in a parameter"
            devices = {self._device_of(move, watch.benches) for move in moves}
            if not reason and len(devices) > 1:
                reason = "on several devices"
            elif not reason and any(move.bench for move in moves) and devices != {self._came_to}:
                reason = "made over on another device"
            self._table.entries[name] = Entry(spec, moves, reason, frozenset(watch.record.reached.get(name, ())))
            self._table.entries[name].proven = not spec.nbytes
        self._table.spoilt.update(spoilt)
        self._table.together += watch.together
        self._table.benches.update(watch.benches)
        self._table.close(watch.parameters.all, watch.record.unseen)

    def _device_of(self, move: Move, benches: Mapping[str, Mapping[str, Form]]) -> torch.device:
        if move.bench:
            return benches[self._module_of(move.parameter)][move.parameter].device
        return self._held[move.parameter].device

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Learn; if that fails, do so no more, and load as without."""
        try:
            yield
        except Exception as error:  # task boundary: no update fails for what is to be learned from it
            log.exception("the loader cannot be learned")
            self._failed = f"{type(error).__name__}: {error}"

    def _use(self) -> None:
        """Work out the places of what may be used."""
        used, report = self._table.usable(quiet=self._comparison.quiet)
        modules = {entry.spec.name: {self._module_of(move.parameter) for move in entry.moves} for entry in used}
        self.modules = frozenset(module for its in modules.values() for module in its)
        addresses = {name: tensor.data_ptr() for name, tensor in self._held.items()}
        moves = {entry.spec.name: entry.moves for entry in used}
        self._benched.learn(self._table.benches, moves, modules, addresses)
        self._ready, self._needed = {}, None
        for entry in used:
            places = (move.rectangle.moved(0 if move.bench else addresses[move.parameter], 0) for move in entry.moves)
            device = self._device_of(entry.moves[0], self._table.benches) if entry.moves else None
            benched = entry.spec.name in self._benched
            self._ready[entry.spec.name] = Learned(entry.spec, device, placement(tuple(places)), benched)
        if report != self.report:
            log.info("the loader's ways with %d tensors: %s", len(self._table.entries), report)
        self.report = report

    def _drop(self) -> None:
        if self._table.entries:
            log.info("what was learned of the loader is forgotten: %s", self._stale or self._failed or "switched off")
        self._table, self._ready, self.report, self._stale = Table(self._module_of), {}, Report(), ""
        self.modules, self._needed = frozenset(), None
        self._comparison.forget()
        self._benched.learn({}, {}, {}, {})


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A tensor's name, dtype and shape."""
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

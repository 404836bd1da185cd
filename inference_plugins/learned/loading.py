"""One engine's loader, learned from its own loads, for as long as its parameters and what comes stay what they are."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import Final, NamedTuple

import torch
from torch.autograd.graph import increment_version

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec
from inference_plugins.assembly import Placement
from inference_plugins.learned.needs import Learned, Needed, needed
from inference_plugins.learned.proof import Evidence, Seen, Shape, Witness, few, look_at, shape_of
from inference_plugins.learned.provenance import bytes_of, layout_of
from inference_plugins.learned.table import OTHER_BYTES, Entry, Report, Table, placement
from inference_plugins.learned.watch import Move, Watch, warm_up

log: Final = logging.getLogger(__name__)

_LOOKING_SECONDS: Final = 5.0
"""How much longer a round may take for comparing what came with what arrived; what is left is compared in the next."""
_WATCHING_SECONDS: Final = 60.0
"""How long the loader may be watched in a round: one that takes longer is not learned, for deadlines' sake."""

Parameters = Callable[[], Mapping[str, torch.Tensor]]


def module_of(parameter: str) -> str:
    """The module that a parameter is of, by its name."""
    return parameter.rpartition(".")[0]


class _Sent(NamedTuple):
    """Bytes that the loader was given, and where they should be when it is done."""

    name: str
    moves: int
    """How many the tensor had when these were seen."""
    move: Move | None
    """None: of a tensor of which nothing was seen to go anywhere."""
    shape: Shape
    seen: Seen


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
    """

    def __init__(self, parameters: Parameters, *, module_of: Callable[[str], str] = module_of, on: bool = True) -> None:
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
        self._sent: list[_Sent] = []
        self._quiet = False
        """Whether nothing but what was seen to be written ever changed, or there is nothing else."""
        self._around: list[int] | None = None
        """What else there was when other contents had come last: digests."""
        self._looked_seconds = 0.0
        """What looking at bytes took in this round."""
        self._watched_seconds = 0.0
        """What the loader took while it was watched."""
        self._witness = Witness()
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
        self.on = self.on and not self._failed
        if not self.on:
            self._drop()
            return
        self._watch, self._came, self._sent, self._looked_seconds = None, {}, [], 0.0
        self._arrived.clear()
        self._watched_seconds = 0.0
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
        """Say where in the memory of ``device`` bytes belong; None: the loader has to be given that tensor."""
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
            places.append(known.place if known is not None and here else None)
        self._arrived.update([spec.name for spec in tensors])
        return places

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
            self._watch = self._watch or Watch(self._held)
            self._came.update(new)
            began = time.monotonic()
            self._watch.run(tensors, load)
            self._watched_seconds += time.monotonic() - began
            if self._watched_seconds > _WATCHING_SECONDS:
                self._failed = f"it took {self._watched_seconds:.0f} s to watch the loader"
        else:
            load()
        if self._looked_seconds < _LOOKING_SECONDS:
            began = time.monotonic()
            with self._trying():
                self._note(tensors)
            self._looked_seconds += time.monotonic() - began

    def finish(self, work: Callable[[], object] | None = None) -> None:
        """All tensors came, and every device is at rest: have ``work`` do what is left to do, and see what arrived.

        Args:
            work: what the engine does when it has been given everything, if it does anything.
        """
        if work is not None and self._watch is not None:
            self._watch.run([], work)
        elif work is not None:
            work()
        if not self._learning:
            return
        with self._trying():
            if self._watch is not None:
                self._enter(self._watch)
            if self._sent or self._watch is not None:
                before = self._known()
                self._judge()
                if self._watch is not None or self._known() != before:
                    self._use()
        self._watch, self._came, self._sent = None, {}, []

    # --- what was seen ------------------------------------------------------------------------------------------------

    def _note(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Look at bytes while they are here, as far as something is still to be learned of them."""
        for name, tensor in tensors:
            entry = self._table.entries.get(name)
            if entry is not None and (entry.reason or (entry.proven and self._quiet)):
                continue
            if entry is None and (self._watch is None or name in self._watch.trouble or not tensor.numel()):
                continue
            moves = entry.moves if entry is not None else self._watch.moves.get(name, []) if self._watch else []
            memory = tensor.reshape(-1).view(torch.uint8)
            row = tensor.shape[-1] if tensor.dim() > 1 else 0
            whole = Rectangle(0, 0, tensor.nbytes)
            ends: list[Move | None] = [*moves] or [None]
            for move in ends:
                rectangle = whole if move is None else move.rectangle
                shape = shape_of(rectangle, tensor.itemsize, row)
                pitch = rectangle.source_pitch if rectangle.rows > 1 else 0
                seen = self._witness.see(memory, rectangle.source, pitch, shape, telling=True)
                self._sent.append(_Sent(name, len(moves), move, shape, seen))

    def _enter(self, watch: Watch) -> None:
        """Make a table of what was watched."""
        if watch.in_use:
            gc.collect()  # what is still there then is kept by somebody
        watch.end()
        spoilt = dict(watch.spoilt)
        after = self._parameters()
        for name, layout in self._layout.items():
            if name not in after or layout_of(after[name]) != layout:
                spoilt[name] = "replaced"
        for name, spec in self._came.items():
            moves, reason = watch.moves.get(name, []), watch.trouble.get(name, "")
            if not moves and not reason and name in watch.looked_at:
                reason = "not in a parameter"
            if not reason and len({self._held[move.parameter].device for move in moves}) > 1:
                reason = "on several devices"
            self._table.entries[name] = Entry(spec, moves, reason, frozenset(watch.reached.get(name, ())))
            self._table.entries[name].proven = not spec.nbytes
        self._table.spoilt.update(spoilt)
        self._table.together += watch.together
        self._table.close(watch.parameters.all, watch.unseen)

    def _judge(self) -> None:
        """Compare what was sent with what is there now."""
        evidence, small = Evidence(), set[str]()
        for sent in self._sent:
            entry = self._table.entries[sent.name]
            if entry.reason or len(entry.moves) != sent.moves:
                continue  # more of it was copied later: in the next round all of its places are known
            arrived = sent.seen
            if sent.move is not None:
                rectangle = sent.move.rectangle
                pitch = rectangle.destination_pitch if rectangle.rows > 1 else 0
                memory = bytes_of(self._held[sent.move.parameter])
                arrived = self._witness.see(memory, rectangle.destination, pitch, sent.shape, telling=False)
            evidence.add(sent.name, sent.seen, arrived)
            if few(sent.shape):
                small.add(sent.name)
        verdicts = evidence.settled()
        changed = {
            name for name, verdict in verdicts.items() if self._table.entries[name].digest not in {None, verdict.digest}
        }
        self._look_around(other_contents=bool(changed))
        for name, verdict in verdicts.items():
            entry = self._table.entries[name]
            entry.digest = verdict.digest
            if not verdict.equal:
                entry.reason = OTHER_BYTES
            elif not entry.moves:
                all_seen = not self._table.around and not self._table.spoilt
                entry.proven |= all_seen or (self._quiet and name in changed and not self._table.spoilt)
            elif verdict.tells and (name not in small or name in changed):
                entry.proven = True

    def _known(self) -> list[object]:
        """What is known of the tensors that were looked at."""
        entries = [self._table.entries[sent.name] for sent in self._sent]
        return [self._quiet, *[(entry.proven, entry.reason) for entry in entries]]

    def _look_around(self, *, other_contents: bool) -> None:
        """See whether anything changed that was not seen to be written; from one round to another one's contents."""
        runs = self._table.around
        looks = [look_at(self._witness, bytes_of(self._held[run.parameter]), *run[1:]) for run in runs]
        now = [int(digest) for digests in looks for digest in digests]
        before, self._around = self._around, now
        if not runs:
            self._quiet = True
        elif before is not None and before != now:
            for entry in self._table.entries.values():
                entry.reason = entry.reason or "written unseen"
        elif before is not None and other_contents:
            self._quiet = True

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
        used, report = self._table.usable(quiet=self._quiet)
        addresses = {name: tensor.data_ptr() for name, tensor in self._held.items()}
        self._ready, self._needed = {}, None
        for entry in used:
            rectangles = tuple(rectangle.moved(addresses[parameter], 0) for parameter, rectangle in entry.moves)
            device = self._held[entry.moves[0].parameter].device if entry.moves else None
            self._ready[entry.spec.name] = Learned(entry.spec, device, placement(rectangles))
        self.modules = frozenset(self._module_of(move.parameter) for entry in used for move in entry.moves)
        if report != self.report:
            log.info("the loader's ways with %d tensors: %s", len(self._table.entries), report)
        self.report = report

    def _drop(self) -> None:
        if self._table.entries:
            log.info("what was learned of the loader is forgotten: %s", self._stale or self._failed or "switched off")
        self._table, self._ready, self.report, self._stale = Table(self._module_of), {}, Report(), ""
        self._quiet, self._around, self.modules, self._needed = False, None, frozenset(), None


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A tensor's name, dtype and shape."""
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

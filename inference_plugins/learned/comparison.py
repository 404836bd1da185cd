"""What was sent and what arrived, round by round, until everything that can be proven is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import torch

from cpe_daemon.core.dtypes import ITEMSIZE
from cpe_daemon.core.rectangles import Rectangle
from inference_plugins.learned.proof import Evidence, Seen, Shape, Witness, few, look_at, shape_of
from inference_plugins.learned.provenance import bytes_of
from inference_plugins.learned.record import Move
from inference_plugins.learned.table import OTHER_BYTES, Entry, Table
from inference_plugins.learned.watch import Watch

_LOOKING_SECONDS: Final = 5.0
"""How much longer a round may take for comparing what came with what arrived; what is left is compared in the next."""


class _Sent(NamedTuple):
    """Bytes that the loader was given, and where they should be when it is done."""

    name: str
    moves: int
    """How many the tensor had when these were seen."""
    move: Move | None
    """None: of a tensor of which nothing was seen to go anywhere."""
    shape: Shape
    seen: Seen


class Comparison:
    """Looks at the bytes of a loader's tensors. Belongs to the receiver's thread."""

    def __init__(self) -> None:
        self.quiet = False
        """Whether nothing but what was seen to be written ever changed, or there is nothing else."""
        self._around: list[int] | None = None
        """What else there was when other contents had come last: digests."""
        self.sent: list[_Sent] = []
        """What was looked at in this round."""
        self._on_benches: dict[tuple[str, Move], Seen] = {}
        """What was on benches before anything was made of it: of which tensor, and where."""
        self._seconds = 0.0
        """What looking at bytes took in this round."""
        self._witness = Witness()

    def forget(self) -> None:
        """All is learned anew."""
        self.quiet, self._around = False, None

    def begin(self) -> None:
        """A round begins."""
        self.sent, self._on_benches, self._seconds = [], {}, 0.0

    def note(self, tensors: Sequence[tuple[str, torch.Tensor]], table: Table, watch: Watch | None) -> None:
        """Look at bytes while they are here, as far as something is still to be learned of them.

        Args:
            tensors: that were loaded just now.
            table: what is known of them.
            watch: what was seen in this round, if the loader was watched.
        """
        if self._seconds >= _LOOKING_SECONDS:
            return
        began = time.monotonic()
        for name, tensor in tensors:
            entry = table.entries.get(name)
            if entry is not None and not (entry.reason or (entry.proven and self.quiet)):
                self._note(name, tensor, entry.moves)
            elif entry is None and watch is not None and name not in watch.record.trouble and tensor.numel():
                moves = watch.record.moves.get(name, [])
                if not any(move.bench for move in moves):  # what is on a bench is looked at once that is known
                    self._note(name, tensor, moves)
        self._seconds += time.monotonic() - began

    def _note(self, name: str, tensor: torch.Tensor, moves: Sequence[Move]) -> None:
        memory = tensor.reshape(-1).view(torch.uint8)
        whole = Rectangle(0, 0, tensor.nbytes)
        ends: list[Move | None] = [*moves] or [None]
        for move in ends:
            rectangle = whole if move is None else move.rectangle
            shape = shape_of(rectangle, tensor.itemsize, _row(tensor.shape))
            pitch = rectangle.source_pitch if rectangle.rows > 1 else 0
            seen = self._witness.see(memory, rectangle.source, pitch, shape, telling=True)
            self.sent.append(_Sent(name, len(moves), move, shape, seen))

    def look(self, bench: Mapping[str, torch.Tensor], entries: Iterable[Entry]) -> None:
        """Look at what a bench holds before anything is made of it.

        Args:
            bench: its tensors, by the parameters' names.
            entries: of tensors that have a part in it, and are still to be proven.
        """
        if self._seconds >= _LOOKING_SECONDS:
            return
        began = time.monotonic()
        for entry in entries:
            spec = entry.spec
            for move in entry.moves:
                if move.bench and move.parameter in bench:
                    shape = shape_of(move.rectangle, ITEMSIZE[spec.dtype], _row(spec.shape))
                    self._on_benches[spec.name, move] = self._arrived(bench[move.parameter], move, shape)
        self._seconds += time.monotonic() - began

    def _arrived(self, parameter: torch.Tensor, move: Move, shape: Shape) -> Seen:
        rectangle = move.rectangle
        pitch = rectangle.destination_pitch if rectangle.rows > 1 else 0
        return self._witness.see(bytes_of(parameter), rectangle.destination, pitch, shape, telling=False)

    def judge(self, table: Table, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Compare what was sent with what is there now, or was there; True if anything is known now that was not."""
        looked_at = [table.entries[sent.name] for sent in self.sent]
        before = [self.quiet, *[(entry.proven, entry.reason) for entry in looked_at]]
        self._judge(table, parameters)
        self.sent, self._on_benches = [], {}
        return before != [self.quiet, *[(entry.proven, entry.reason) for entry in looked_at]]

    def _judge(self, table: Table, parameters: Mapping[str, torch.Tensor]) -> None:
        evidence, small = Evidence(), set[str]()
        unseen = {sent.name for sent in self.sent if self._is_unseen(sent)}
        for sent in self.sent:
            entry = table.entries[sent.name]
            if entry.reason or len(entry.moves) != sent.moves or sent.name in unseen:
                continue  # more of it was copied later: in the next round all of its places are known
            arrived = sent.seen
            if sent.move is not None and sent.move.bench:
                arrived = self._on_benches[sent.name, sent.move]
            elif sent.move is not None:
                arrived = self._arrived(parameters[sent.move.parameter], sent.move, sent.shape)
            evidence.add(sent.name, sent.seen, arrived)
            if few(sent.shape):
                small.add(sent.name)
        verdicts = evidence.settled()
        changed = {
            name for name, verdict in verdicts.items() if table.entries[name].digest not in {None, verdict.digest}
        }
        self._look_around(table, parameters, other_contents=bool(changed))
        for name, verdict in verdicts.items():
            entry = table.entries[name]
            entry.digest = verdict.digest
            if not verdict.equal:
                entry.reason = OTHER_BYTES
            elif not entry.moves:
                all_seen = not table.around and not table.spoilt
                entry.proven |= all_seen or (self.quiet and name in changed and not table.spoilt)
            elif verdict.tells and (name not in small or name in changed):
                entry.proven = True

    def _is_unseen(self, sent: _Sent) -> bool:
        """Whether it went to a bench that nobody looked at."""
        return sent.move is not None and sent.move.bench and (sent.name, sent.move) not in self._on_benches

    def _look_around(self, table: Table, parameters: Mapping[str, torch.Tensor], *, other_contents: bool) -> None:
        """See whether anything changed that was not seen to be written; from one round to another one's contents."""
        looks = [look_at(self._witness, bytes_of(parameters[run.parameter]), *run[1:]) for run in table.around]
        now = [int(digest) for digests in looks for digest in digests]
        before, self._around = self._around, now
        if not table.around:
            self.quiet = True
        elif before is not None and before != now:
            for entry in table.entries.values():
                entry.reason = entry.reason or "written unseen"
        elif before is not None and other_contents:
            self.quiet = True


def _row(shape: Sequence[int]) -> int:
    """Elements of the last of several dimensions."""
    return shape[-1] if len(shape) > 1 else 0

"""Watches a loader at work: which bytes of the tensors that it is given it copies where, and what else it does.

Every operation on tensors passes by here (`modes`), where slices, views and copies of any spelling have become memory
and strides. Where an engine makes a module's tensors over (`benches`), what it does then is looked at by itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from cpe_daemon.core.rectangles import strided
from cpe_daemon.errors import MisuseError
from inference_plugins.learned.benches import Form, form_of, module_of
from inference_plugins.learned.modes import has_tensors, looking_on, shares_memory, tensors_in, written_by
from inference_plugins.learned.provenance import Piece, Scratch, Span, Spans, extent, layout_of, span_of
from inference_plugins.learned.record import Making, Move, Record

log: Final = logging.getLogger(__name__)

_aten: Final = torch.ops.aten
_CLONES: Final = (_aten.clone.default, _aten._to_copy.default)
_BLIND: Final = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
        *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
        *("is_pinned", "is_same_size", "record_stream", "_has_compatible_shallow_copy_type"),
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
    }
)
"""Operations that look at no values."""
_FROM_PARAMETER: Final = "copied from a parameter"

Owner = Span | Scratch
"""Whose a tensor's memory is: a parameter's, a tensor's that was given, or what the loader made of it."""


class Watch:
    """What was seen in one round. Belongs to the receiver's thread.

    Args:
        parameters: what the loader may write to.
        module_of: which module a parameter is of.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], module_of: Callable[[str], str] = module_of) -> None:
        self.record = Record()
        """All of it; while a module is made over, what comes of that."""
        self.benches: dict[str, Mapping[str, Form]] = {}
        """By module: the tensors that the loader put its bytes in, before the engine made others of them."""
        self.looked_at = set[str]()
        """Tensors that were read at all."""
        self.together: list[set[str]] = []
        """Tensors that were copied only when others came, with these."""
        self.parameters = Spans(span_of(name, tensor) for name, tensor in parameters.items())
        self._given = Spans([])
        self._given_names = set[str]()
        self._escaped = set[str]()
        """Tensors of those that are given whose bytes somebody has."""
        self._scratch: dict[int, Scratch] = {}
        self._module_of = module_of
        self._making = False
        """Whether a module is being made over."""

    def run(self, tensors: Sequence[tuple[str, torch.Tensor]], load: Callable[[], object]) -> None:
        """Have ``load`` do with tensors what it does, and look on.

        Args:
            tensors: contiguous; their memory is theirs until this returns.
            load: is given them, or slices of them.
        """
        self._given = Spans(span_of(name, tensor) for name, tensor in tensors)
        self._given_names = {name for name, _ in tensors}
        self._escaped.clear()
        try:
            with looking_on(self):
                load()
        finally:
            self._given = Spans([])
            self._scratch = {at: scratch for at, scratch in self._scratch.items() if not scratch.freed}

    @property
    def in_use(self) -> bool:
        """Whether there is memory that loading made."""
        return any(scratch.names and not scratch.freed for scratch in self._scratch.values())

    def end(self) -> None:
        """No more comes: what is still in memory that is no parameter's is kept there for something."""
        for scratch in self._scratch.values():
            if not scratch.freed:
                self._trouble(scratch.names, "kept in other memory")

    # --- benches ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def making_over(self, module: str) -> Iterator[Callable[[Mapping[str, torch.Tensor]], None]]:
        """In it, a module's tensors are made over: from when what this returns was told of its bench, which is filled.

        If that is more than to copy them, and of nothing but them, they are taken for tensors that go to the bench.
        """
        whole, making = self.record, list[Making]()

        def filled(bench: Mapping[str, torch.Tensor]) -> None:
            making.append(self._lay_out(module, bench))
            self.record, self._making = making[0].record, True

        try:
            yield filled
        finally:
            self.record, self._making = whole, False
        if making:
            self._made_over(making[0])

    def _lay_out(self, module: str, bench: Mapping[str, torch.Tensor]) -> Making:
        """What came to a bench."""
        making = Making(module, forms={name: form_of(tensor) for name, tensor in bench.items()})
        for name, tensor in bench.items():
            scratch = self._scratch.get(tensor.untyped_storage().data_ptr())
            if scratch is None or scratch.freed or tensor.data_ptr() != scratch.begin:
                making.reason = making.reason or "not whole"
                continue
            making.scratch.append(scratch)
            making.add(name, scratch, tensor.nbytes if extent(tensor) == tensor.nbytes else -1)
        making.before = list(self._scratch.values())
        return making

    def _made_over(self, making: Making) -> None:
        """See what came of a module's tensors: copies, or what has to be made of a bench each time."""
        if making.copied:
            self.record.take(making.record)
            return
        if making.reason or making.reaches_beyond(self._module_of):
            self.record.take(making.record)
            self.record.take(Record(reached=making.loaded.reached))
            return
        self.record.take(making.loaded)
        self.benches[making.module] = making.forms
        left = {id(scratch) for scratch in making.before} - {id(scratch) for scratch in making.scratch}
        self._scratch = {at: scratch for at, scratch in self._scratch.items() if id(scratch) in left}

    # --- what was done ------------------------------------------------------------------------------------------------

    def escaped(self, tensor: torch.Tensor, method: str) -> None:
        """Somebody has the bytes."""
        owner = self._owner(tensor)
        if owner is not None:
            self._read(owner, method)
            self._escaped.update(self._names(owner))

    def puzzled(self, operation: Any, error: Exception) -> None:
        """An operation was not understood: nothing is said of the tensors that are being loaded."""
        log.warning("could not follow %s: %s: %s", operation, type(error).__name__, error)
        self._trouble([span.name for span in self._given.all], "not understood")

    def done(self, operation: Any, inputs: Sequence[Any], named: Mapping[str, Any], outcome: Any) -> None:
        """An operation was done."""
        if operation is _aten.copy_.default:
            self._copied(inputs[0], inputs[1])
        elif operation is _aten._foreach_copy_.default:
            for destination, source in zip(inputs[0], inputs[1], strict=True):
                self._copied(destination, source)
        elif operation in _CLONES:
            self._copied(outcome, inputs[0])
        elif operation._schema.name.rpartition("::")[2] not in _BLIND:
            self._used(operation, inputs, named, outcome)

    def _copied(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if destination.is_meta or source.is_meta or not destination.numel():
            return
        if destination.data_ptr() == source.data_ptr() and layout_of(destination) == layout_of(source):
            return  # onto itself
        read, written = self._owner(source), self._owner(destination)
        if read is None and written is None:
            return
        if read is not None:
            self.looked_at.update(self._names(read))
            if isinstance(read, Span) and not self._is_given(read):  # what is made of it has to be made again
                self.record.spoilt.setdefault(read.name, _FROM_PARAMETER)
        if written is None:
            written = self._made(destination)
        try:
            pieces = self._pieces(destination, written, source, read)
        except MisuseError as error:
            self._spoil(written, error.message, self._escaped if read is None else self._names(read))
            return
        if isinstance(written, Scratch):
            written.add(pieces)
        elif self._is_given(written):
            self._spoil(written, "overwritten", ())
        else:
            if not self._making and (late := {piece.tensor for piece in pieces} - self._given_names):
                self.together.append(late | self._given_names)
            for tensor, rectangle in pieces:
                self.record.moves.setdefault(tensor, []).append(Move(written.name, rectangle))
                self.record.reached.setdefault(tensor, set()).add(written.name)

    def _pieces(
        self, destination: torch.Tensor, written: Owner, source: torch.Tensor, read: Owner | None
    ) -> list[Piece]:
        """What a copy brings where.

        Raises:
            MisuseError: it is no plain copy, or not of tensors' bytes; says why.
        """
        if read is None:
            if isinstance(written, Span) and not self._escaped:
                self.record.unseen.add(written.name)
            raise MisuseError("filled from other memory")
        if isinstance(read, Scratch) and read.spoilt:
            raise MisuseError(read.spoilt)
        if destination.dtype != source.dtype:
            raise MisuseError(f"converted to {str(destination.dtype).removeprefix('torch.')}")
        if any(tensor.is_conj() or tensor.is_neg() for tensor in (destination, source)):
            raise MisuseError("conjugated")
        spread, size = source.expand(destination.shape), source.itemsize
        rectangles = strided(
            destination.shape,
            size,
            destination.data_ptr() - written.begin,
            [stride * size for stride in destination.stride()],
            source.data_ptr() - read.begin,
            [stride * size for stride in spread.stride()],
        )
        if isinstance(read, Scratch):
            return [piece for rectangle in rectangles for piece in read.read(rectangle)]
        if not self._is_given(read):
            raise MisuseError(_FROM_PARAMETER)
        return [Piece(read.name, rectangle) for rectangle in rectangles]

    def _used(self, operation: Any, inputs: Sequence[Any], named: Mapping[str, Any], outcome: Any) -> None:
        """Something else than a copy: whatever it reads is no plain copy any more, nor is what it writes."""
        name = operation._schema.name.rpartition("::")[2]
        written = list(written_by(operation, inputs, named))
        given = list(tensors_in([inputs, named]))
        made = [tensor for tensor in tensors_in([outcome]) if not shares_memory(tensor, given)]
        if not written and not made and has_tensors(outcome):
            return  # a view
        names = set[str]()
        for tensor in given:
            owner = self._owner(tensor)
            if owner is not None:
                names.update(self._names(owner))
                self._read(owner, name)
        for tensor in [*written, *made]:
            if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
                continue
            owner = self._owner(tensor)
            self._spoil(owner or self._made(tensor), name, names)

    def _read(self, owner: Owner | None, reason: str) -> None:
        """Somebody made something else of bytes than a copy."""
        if owner is None:
            return
        self.looked_at.update(self._names(owner))
        if isinstance(owner, Span) and not self._is_given(owner):
            self.record.spoilt.setdefault(owner.name, reason)
        else:
            self._trouble(self._names(owner), reason)

    def _spoil(self, owner: Owner, reason: str, names: Iterable[str]) -> None:
        """Bytes were written that are not known to be tensors'."""
        names = list(names)
        self._trouble(names, reason)
        if isinstance(owner, Scratch):
            owner.spoil(reason, names)
        elif self._is_given(owner):
            self._trouble([owner.name], reason)
        else:
            self.record.spoilt.setdefault(owner.name, reason)
            for name in names:
                self.record.reached.setdefault(name, set()).add(owner.name)

    def _trouble(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.record.trouble.setdefault(name, reason)

    # --- whose memory -------------------------------------------------------------------------------------------------

    def _owner(self, tensor: torch.Tensor) -> Owner | None:
        if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
            return None
        begin = tensor.data_ptr()
        if not begin:
            return None
        end = begin + extent(tensor)
        known = self._given.find(begin, end) or self.parameters.find(begin, end)
        if known is not None:
            return known
        scratch = self._scratch.get(tensor.untyped_storage().data_ptr())
        return None if scratch is None or scratch.freed else scratch

    def _made(self, tensor: torch.Tensor) -> Scratch:
        scratch = Scratch(tensor)
        self._scratch[scratch.begin] = scratch
        return scratch

    def _is_given(self, span: Span) -> bool:
        return self._given.find(span.begin, span.end) is span

    def _names(self, owner: Owner) -> Iterable[str]:
        """Tensors whose bytes are there."""
        if isinstance(owner, Scratch):
            return owner.names
        return [owner.name] if self._is_given(owner) else []


def warm_up() -> None:
    """Take all steps once: torch imports more of itself when it is first watched."""
    parameter, tensor = torch.zeros(1), torch.ones(1)
    Watch({"": parameter}).run([("", tensor)], lambda: parameter.copy_(tensor))

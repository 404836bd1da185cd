"""What a torch engine's tensors are written to: a module, a dict of tensors, or a callback."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Final, Protocol

import torch
from torch.autograd.graph import increment_version

from cpe_daemon.core.rectangles import strided
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import ManifestError, MisuseError
from inference_plugins.assembly import Place, Placement, meta_of

Slicing = Callable[[str], int | None] | Mapping[str, int]
"""The tensor-parallel rule: parameter name to the dimension along which ranks share it; None (or no entry): whole."""

Callback = Callable[[str, torch.Tensor], object]

_NAMED: Final = 10
_PLAIN: Final = (torch.Tensor, torch.nn.Parameter)
"""Subclasses of these may keep their values elsewhere."""


class Target(Protocol):
    """Where an update's tensors go. Used by one thread."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Raise unless an update by these can be written and leaves nothing out."""
        ...

    def begin(self) -> None:
        """An update begins: nothing has come yet."""
        ...

    def cut(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """This rank's part of each of these; raises unless every one can be written, and writes nothing."""
        ...

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Placement | None]:
        """Say where each may be copied by address on ``device``, and count it as written.

        None: it has to be given to `write`. Raises like `cut`.
        """
        ...

    def write(self, name: str, part: torch.Tensor) -> None:
        """Copy this rank's part of a tensor to its place; from or to a GPU the copy may still be under way then."""
        ...

    def missing(self) -> list[str]:
        """Names that were expected in this update and did not come."""
        ...

    def prove(self) -> None:
        """All was written, and the GPUs are at rest: compare what is there, if something is to be learned from it."""
        ...

    def gpus(self) -> set[torch.device]:
        """The GPUs whose memory is written to."""
        ...

    def unsettled(self) -> set[torch.device]:
        """Those on which something of this update may be under way still, although its slots have been let go."""
        ...


class Slicer:
    """Cuts a rank's part out of a full tensor.

    Args:
        rule: which dimension is shared.
        rank: this worker's.
        world_size: how many share.
    """

    def __init__(self, rule: Slicing | None, rank: int, world_size: int) -> None:
        self._rule = rule
        self._rank = rank
        self._world_size = world_size

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view that belongs to this rank.

        Raises:
            ManifestError: the rule names a dimension that cannot be shared equally.
        """
        if self._rule is None:
            return tensor
        dim = self._rule(name) if callable(self._rule) else self._rule.get(name)
        if dim is None:
            return tensor
        if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] % self._world_size:
            raise ManifestError(
                f"{name} {list(tensor.shape)} cannot be sliced along dimension {dim} for {self._world_size} ranks"
            )
        size = tensor.shape[dim] // self._world_size
        return tensor.narrow(dim, self._rank * size, size)


class TensorTarget:
    """A set of named tensors, written in place.

    Names that are one tensor (tied weights) count as written when any of them comes; when several come, the last one
    stands, so a checkpoint that holds them all must hold them equal.

    Args:
        tensors: called at the beginning of each update, for modules may have moved.
        slicer: cuts this rank's part.
        ignore: names of a version that have no place here and may be passed over.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, object]], slicer: Slicer, ignore: Collection[str]) -> None:
        self._tensors = tensors
        self._slicer = slicer
        self._ignore = frozenset(ignore)
        self._places: dict[str, torch.Tensor] = {}
        self._memory: dict[str, Hashable] = {}
        self._known: dict[str, tuple[TensorSpec, Placement | None]] = {}
        """What was looked up for tensors of a version; good as long as the memory here is the same."""
        self._written: set[Hashable] = set()
        self._wrote = False
        """Whether anything of this update came by `write`."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Refuse what `cut` would refuse, and a version that brings nothing for a tensor here.

        What is found out by the way need not be once the engine has paused.

        Raises:
            ManifestError: names the first ten of each kind.
        """
        self._look_up()
        self._learn(tensors)
        brought = {self._memory[spec.name] for spec in tensors if spec.name in self._memory}
        missing = [name for name, memory in self._memory.items() if memory not in brought]
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise ManifestError(f"the version brings nothing for {', '.join(missing[:_NAMED])}{more}")

    def begin(self) -> None:
        """Look the tensors up anew."""
        self._look_up()
        self._written.clear()
        self._wrote = False
        increment_version(self._places.values())  # for who watches them, as autograd does: copies by address go unseen

    def _look_up(self) -> None:
        before = self._memory
        self._places = {n: t for n, t in self._tensors().items() if isinstance(t, torch.Tensor)}
        self._memory = {name: _memory_of(tensor) for name, tensor in self._places.items()}
        self._known = {n: known for n, known in self._known.items() if self._memory.get(n) == before.get(n)}

    def cut(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Cut this rank's parts; refuse a tensor without a place, or a part of another dtype or shape than its place.

        Raises:
            ManifestError: names the first ten and what is wrong with each.
        """
        parts, wrong = list[tuple[str, torch.Tensor]](), list[str]()
        for name, tensor in tensors:
            place = self._places.get(name)
            part = tensor if place is None else self._slicer.cut(name, tensor)
            parts.append((name, part))
            if reason := self._mismatch(name, place, tensor, part):
                wrong.append(reason)
        if wrong:
            more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise ManifestError("; ".join(wrong[:_NAMED]) + more)
        return parts

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Placement | None]:
        """The memory of each tensor on ``device``, of a part of whose bytes it is a plain copy: a run, or some columns.

        It is looked up once, and remembered as long as the tensors here and the version's are the same: the caches are
        empty after every bucket, and asking torch for it again would take a tenth of the time that the copies do.

        Raises:
            ManifestError: as `cut`.
        """
        self._learn(tensors)
        places = [self._known[spec.name][1] if self._is_on(device, spec.name) else None for spec in tensors]
        found = [spec.name for spec, place in zip(tensors, places, strict=True) if place is not None]
        self._written.update([self._memory[name] for name in found if name in self._memory])
        return places

    def write(self, name: str, part: torch.Tensor) -> None:
        """Copy in place; nothing, if the name is one to be ignored."""
        place = self._places.get(name)
        if place is not None:
            place.detach().copy_(part)
            self._wrote = True
            self._written.add(self._memory[name])

    def missing(self) -> list[str]:
        """Names whose tensor nothing was written to."""
        return [name for name, memory in self._memory.items() if memory not in self._written]

    def prove(self) -> None:
        """Nothing is to be learned."""

    def gpus(self) -> set[torch.device]:
        """Those of the tensors that were looked up last."""
        if not self._places:
            self._look_up()
        return {tensor.device for tensor in self._places.values() if tensor.is_cuda}

    def unsettled(self) -> set[torch.device]:
        """None, if all was copied by address, on the slots' own stream; torch may have copied between GPUs."""
        return self.gpus() if self._wrote else set()

    def _learn(self, tensors: Sequence[TensorSpec]) -> None:
        """Look up what is not known yet of a version's tensors."""
        new = [spec for spec in tensors if not self._is_known(spec)]
        parts = self.cut([(spec.name, meta_of(spec)) for spec in new])
        self._known.update({spec.name: (spec, self._find(*part)) for spec, part in zip(new, parts, strict=True)})

    def _is_known(self, spec: TensorSpec) -> bool:
        """Whether its place was looked up before, and the tensor here has the same memory still."""
        known, place = self._known.get(spec.name, (None, None))
        if known != spec:
            return False
        here = self._places.get(spec.name)
        if place is None or here is None:
            return True
        return here.data_ptr() == (place.address if isinstance(place, Place) else place[0].destination)

    def _is_on(self, device: torch.device, name: str) -> bool:
        """Whether a tensor here is; one that is ignored is as good as anywhere."""
        here = self._places.get(name)
        return here is None or here.device == device

    def _find(self, name: str, part: torch.Tensor) -> Placement | None:
        place = self._places.get(name)
        if place is None:
            return Place(0, 0)  # ignored: nothing of it is wanted
        if not _is_plain(place):
            return None
        start = int(part.storage_offset()) * part.itemsize
        if part.is_contiguous() and place.is_contiguous():
            return Place(place.data_ptr(), place.nbytes, start)
        written, read = ([stride * part.itemsize for stride in tensor.stride()] for tensor in (place, part))
        try:
            return tuple(strided(part.shape, part.itemsize, place.data_ptr(), written, start, read))
        except MisuseError:
            return None

    def _mismatch(self, name: str, place: torch.Tensor | None, tensor: torch.Tensor, part: torch.Tensor) -> str | None:
        """What keeps this rank's part of a tensor from being written."""
        if place is None:
            return None if name in self._ignore else f"no tensor here is called {name}"
        if place.is_meta:
            return f"{name} has no memory here, it is on the meta device"
        if place.dtype != part.dtype:
            return f"{name} is {place.dtype} here, {part.dtype} in the version"
        if place.shape != part.shape:
            sliced = f" (cut from {list(tensor.shape)})" if part.shape != tensor.shape else ""
            return f"{name} is {list(place.shape)} here, {list(part.shape)}{sliced} in the version"
        return None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values lie in its device's memory where its strides say, each as in a version's bytes."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        return False
    return bool(not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr())


def _memory_of(tensor: torch.Tensor) -> Hashable:
    """The same for tensors that are the same bytes in the same order: a state dict has an object for each tied name."""
    if not tensor.numel() or not tensor.data_ptr():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class CallbackTarget:
    """Hands each tensor to a function, which must be done with it when it returns, and must not write to it.

    On a GPU it need only have issued what it does with it, on torch's current stream.
    """

    def __init__(self, callback: Callback, slicer: Slicer) -> None:
        self._callback = callback
        self._slicer = slicer
        self._called = False
        """Whether the function was given anything in this update."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Refuse what cannot be sliced; the function alone knows more."""
        self.cut([(spec.name, meta_of(spec)) for spec in tensors])

    def begin(self) -> None:
        """Nothing was given to the function."""
        self._called = False

    def cut(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Cut this rank's parts; refuse what cannot be sliced."""
        return [(name, self._slicer.cut(name, tensor)) for name, tensor in tensors]

    def prove(self) -> None:
        """Nothing is to be learned."""

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Placement | None]:
        """The function is given them all."""
        return [None] * len(tensors)

    def write(self, name: str, part: torch.Tensor) -> None:
        """Call the function."""
        self._called = True
        self._callback(name, part)

    def missing(self) -> list[str]:
        """The function alone knows what it expects, and may raise."""
        return []

    def gpus(self) -> set[torch.device]:
        """The thread's current one, if this process uses any: the function alone knows better."""
        return {torch.device("cuda", torch.cuda.current_device())} if torch.cuda.is_initialized() else set()

    def unsettled(self) -> set[torch.device]:
        """All, once the function was called: it may have streams of its own."""
        return self.gpus() if self._called else set()

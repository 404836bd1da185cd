"""One model's weights, replaced through its own loader, and nothing believed of that but what is in its memory.

Modules that need no loader (`inference_plugins.learned`) are left out: what came of them is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, Final, NamedTuple

import torch

from cpe_daemon.errors import EngineError
from inference_plugins.learned import unwatched
from inference_plugins.learned.provenance import Spans, span_of
from inference_plugins.sglang.marks import Marks

_NAMED: Final = 10
_NEVER: Final = "_cpe_never_loaded"


class Never(NamedTuple):
    """What the checkpoint on disk has not, of parameters that are never loaded, or not all of them.

    Attributes:
        counts: of how many elements it has none.
        defaults: what these parameters were before, as `Marks` has them. A version without them has these.
    """

    counts: Mapping[str, int]
    defaults: Mapping[str, torch.Tensor]


class Reload:
    """Replaces the weights of one model (see `inference_plugins.gated.Reloading`).

    A model that was loaded only in part keeps the mark, a NaN, where nothing came: it is of no use until a version has
    been loaded whole.

    Args:
        runner: SGLang's, of the model. Its updater makes weights that were packed for kernels loadable, and packs
            them again.
        spared: returns the names of modules that are not reloaded in this update: others write to their parameters.
    """

    def __init__(self, runner: Any, spared: Callable[[], Set[str]] = frozenset) -> None:
        self._runner = runner
        self._spared = spared
        self._marks: Marks | None = None

    def begin(self) -> None:
        """Mark all parameters that come by the loader."""
        self._runner.weight_updater.begin_weight_update()
        model = self._runner.model
        self._marks = Marks(_parameters(model, self._spared()), never_loaded(model).defaults)
        self._marks.set()

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Give tensors to the model's loader."""
        self._runner.model.load_weights(list(tensors))

    def finish(self) -> None:
        """Complete the reload.

        Raises:
            EngineError: there are elements that nothing was written to.
        """
        if self._marks is None:
            raise EngineError("no reload was begun")
        with unwatched():
            self._check(self._marks)
        self._marks = None
        self._runner.weight_updater.end_weight_update(run_post_load=False)

    def undo(self) -> None:
        """Forget what was begun: what was written over is gone."""
        self._marks = None

    def _check(self, marks: Marks) -> None:
        """See that nothing is missing that a checkpoint has, and restore what none has."""
        left = marks.left()
        counts, defaults = never_loaded(self._runner.model)
        known = marks.defaults(defaults)
        missing = {name: found for name, found in left.items() if name not in known or found[0] > counts[name]}
        if missing:
            named = [f"{name} ({count} of {total} elements)" for name, (count, total) in missing.items()]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            raise EngineError(f"not all tensors came of {', '.join(named[:_NAMED])}{more}")
        marks.restore()


def _parameters(model: torch.nn.Module, spared: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's, but for those that lie in the memory of some modules, whosever they are."""
    named = model.named_parameters(remove_duplicate=False) if spared else ()
    others = Spans(span_of(name, parameter) for name, parameter in named if name.rpartition(".")[0] in spared)
    for name, parameter in model.named_parameters():
        begin, end, _ = span_of(name, parameter)
        if others.find(begin, end) is None:
            yield name, parameter


def never_loaded(model: Any) -> Never:
    """What was noted when a model was loaded from disk; nothing, if it was not."""
    found: Never = getattr(model, _NEVER, Never({}, {}))
    return found


def load_marked(original: Callable[..., Any], model: Any, *arguments: Any, **named: Any) -> Any:
    """Have a model loaded from disk, and note which parameters no checkpoint has: defaults of scales and the like."""
    if hasattr(model, _NEVER):
        return original(model, *arguments, **named)
    marks = Marks.keeping_small(model.named_parameters())
    marks.set()
    result = original(model, *arguments, **named)
    counts = {name: count for name, (count, _) in marks.left().items()}
    setattr(model, _NEVER, Never(counts, marks.defaults(counts)))
    marks.restore()
    return result

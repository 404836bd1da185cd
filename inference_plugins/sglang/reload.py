"""One model's weights, replaced through its own loader, and nothing believed of that but what is in its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from cpe_daemon.errors import EngineError
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
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._marks: Marks | None = None

    def begin(self) -> None:
        """Mark all parameters."""
        self._runner.weight_updater.begin_weight_update()
        model = self._runner.model
        self._marks = Marks(model.named_parameters(), never_loaded(model).defaults)
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
        left = self._marks.left()
        counts, defaults = never_loaded(self._runner.model)
        known = self._marks.defaults(defaults)
        missing = {name: found for name, found in left.items() if name not in known or found[0] > counts[name]}
        if missing:
            named = [f"{name} ({count} of {total} elements)" for name, (count, total) in missing.items()]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            raise EngineError(f"not all tensors came of {', '.join(named[:_NAMED])}{more}")
        self._marks.restore()
        self._marks = None
        self._runner.weight_updater.end_weight_update(run_post_load=False)

    def undo(self) -> None:
        """Forget what was begun: what was written over is gone."""
        self._marks = None


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

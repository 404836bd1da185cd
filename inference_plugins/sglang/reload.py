"""One model's weights, replaced through its own loader, and nothing believed of that but what is in its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from cpe_daemon.errors import EngineError
from inference_plugins.sglang.marks import Marks

_NAMED: Final = 10
_NEVER: Final = "_cpe_never_loaded"


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
        self._marks = Marks(model.named_parameters(), never_loaded(model))
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
        never = never_loaded(self._runner.model)
        left = self._marks.left()
        missing = {name: found for name, found in left.items() if found[0] > never.get(name, 0)}
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


def never_loaded(model: Any) -> Mapping[str, int]:
    """Parameters that the checkpoint on disk has not, or not all of: of how many elements it has none."""
    found: Mapping[str, int] = getattr(model, _NEVER, {})
    return found


def load_marked(original: Callable[..., Any], model: Any, *arguments: Any, **named: Any) -> Any:
    """Have a model loaded from disk, and note which parameters no checkpoint has: defaults of scales and the like."""
    if hasattr(model, _NEVER):
        return original(model, *arguments, **named)
    marks = Marks.keeping_small(model.named_parameters())
    marks.set()
    result = original(model, *arguments, **named)
    setattr(model, _NEVER, {name: count for name, (count, _) in marks.left().items()})
    marks.restore()
    return result

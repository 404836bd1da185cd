"""Which tensors of a version are for which of a server's models: the one that it serves, and a draft of that.

A draft model that is part of the same checkpoint, as for multi-token prediction, is given every tensor, and picks its
own by their names there. One that has a checkpoint of its own takes those whose names begin with ``draft_model.``,
after which come the names in that checkpoint. The model takes all others.

A draft only proposes what the model then verifies: a version that has nothing for it leaves it as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import torch

from inference_plugins.vllm.reload import Reload

log: Final = logging.getLogger(__name__)

DRAFT: Final = "draft_model."


class Target:
    """The model that is served (see `inference_plugins.gated.Reloading`)."""

    def __init__(self, reload: Reload) -> None:
        self._reload = reload

    def begin(self) -> None:
        """Make ready for its tensors."""
        self._reload.begin()

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load those that are not a draft's."""
        if own := [pair for pair in tensors if not pair[0].startswith(DRAFT)]:
            self._reload.load(own)

    def finish(self) -> None:
        """Complete the reload; all has to have come."""
        self._reload.finish()

    def undo(self) -> None:
        """Put back what is not complete."""
        self._reload.undo()


class Draft:
    """A draft model.

    Args:
        reload: of it.
        apart: it has a checkpoint of its own.
    """

    def __init__(self, reload: Reload, *, apart: bool) -> None:
        self._reload = reload
        self._apart = apart
        self._told = False

    def begin(self) -> None:
        """Make ready for its tensors."""
        self._reload.begin()

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load its own."""
        if self._apart:
            tensors = [(name.removeprefix(DRAFT), tensor) for name, tensor in tensors if name.startswith(DRAFT)]
        if tensors:
            self._reload.load(tensors)

    def finish(self) -> None:
        """Complete the reload; if anything came, all has to have come."""
        if not self._reload.idle:
            self._reload.finish()
            return
        self._reload.undo()
        if not self._told:
            names = f", whose names would begin with {DRAFT}" if self._apart else ""
            log.warning("versions have no tensors for the draft model%s: it stays as it is", names)
            self._told = True

    def undo(self) -> None:
        """Put back what is not complete."""
        self._reload.undo()

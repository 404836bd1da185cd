"""Whether a worker's engine may serve while no round is under way, and how it is kept from that.

What is done here is asked for by nobody who awaits an answer: an engine that raises must not end the link, its only way
back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from cpe_daemon.errors import CpeError
from inference_plugins.loader import Loader

log: Final = logging.getLogger(__name__)

_PATIENT_INTERVALS: Final = 4.0
"""Heartbeats that a try to pause may take at the most: the daemon has to hear something between two of them."""


class Holding:
    """Belongs to the receiver's thread.

    Args:
        loader: the engine.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.held = False
        """Whether what the engine holds must not be served: the daemon said so, or it slept; until it is resumed."""
        self._patience = 0.0
        """Seconds that the next try to pause is given; 0: it has paused."""

    def begin(self, seconds: float) -> None:
        """The engine must not serve: pause it now, or, if it does not come to rest in ``seconds``, by `keep`."""
        self.held = True
        self._patience = 2 * seconds
        if self._loader.asleep or self._try("pause", lambda: self._loader.pause(seconds)):
            self._patience = 0.0

    def keep(self, interval: float) -> None:
        """Try again to pause a held engine that was busy, with more patience; a round has its own pause.

        Args:
            interval: between two heartbeats, seconds.
        """
        if not self.held or not self._patience or self._loader.asleep:
            return
        patience = min(self._patience, _PATIENT_INTERVALS * interval)
        done = self._try("pause", lambda: self._loader.pause(patience))
        self._patience = 0.0 if done else 2 * patience

    def let_serve(self) -> None:
        """Have the engine serve if it may."""
        if not self.held and not self._loader.touched:
            self._try("resume", self._loader.resume)

    def _try(self, what: str, work: Callable[[], None]) -> bool:
        """Have the engine do something; True if it did."""
        try:
            work()
        except CpeError as error:
            log.warning("the engine did not %s: %s", what, error)
        except Exception:  # task boundary: what the engine raises must not end the link, its only way back
            log.exception("the engine could not %s", what)
        else:
            return True
        return False

"""A worker whose server's own thread waits in a gate while versions come: no daemon, no server."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.rows import copying
from cpe_daemon.errors import EngineError
from inference_plugins.assembly import Place
from inference_plugins.gate import Gate
from inference_plugins.gated import GatedLoader
from inference_plugins.learned.loading import spec_of

CPU = torch.device("cpu")
LONG = 20.0


class GatedWorker:
    """Args: the loader and its gate, and threads of which one plays the server's."""

    def __init__(self, loader: GatedLoader, gate: Gate, threads: ThreadPoolExecutor) -> None:
        self.loader = loader
        self.gate = gate
        self.given: list[str] = []
        """Tensors that the loader was given in the last round."""
        self.failure = ""
        """Why a round was given up, if one was."""
        self._threads = threads

    def push(self, number: int, tensors: Mapping[str, Tensor], *, fails_at: str = "", announced: bool = True) -> bool:
        """Tensor by tensor, as if each were a bucket; False if the round was given up."""
        version, self.given = VersionId("m", "r", number), []
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        if announced:
            self.loader.expect(specs)
        held = self._threads.submit(self.gate.hold, LONG)
        try:
            self.loader.begin()
            for spec in specs:
                self._bring(spec.name, tensors[spec.name].clone(), fails=spec.name == fails_at)
            self.loader.finish(version)
        except (EngineError, ValueError) as error:
            self.failure = str(error)
            self.loader.abandon(str(error))
            return False
        finally:
            held.result(LONG)
        self.loader.resume()
        return True

    def _bring(self, name: str, slot: Tensor, *, fails: bool) -> None:
        (place,) = self.loader.place([spec_of(name, slot)], CPU)
        if fails:
            raise ValueError("given up")
        if place is None:
            self.given.append(name)
            self.loader.load([(name, slot)])
        else:
            rectangles = [Rectangle(place.address, place.start, place.nbytes)] if isinstance(place, Place) else place
            copying(rectangles)(slot.data_ptr())
        self.loader.make_over()
        slot.fill_(-1.0)

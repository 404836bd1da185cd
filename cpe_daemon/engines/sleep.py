"""What becomes of an engine whose workers go to sleep and wake up."""

from __future__ import annotations

import structlog

from cpe_daemon.core.lifecycle import EngineEvent
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.worker import Worker
from cpe_daemon.wire.messages import WorkerState

log = structlog.get_logger(__name__)


def take_state(engine: Engine, worker: Worker, state: WorkerState, device: Device) -> bool:
    """Note what a worker says of its sleep; False if it says nothing new, which then changes nothing.

    One that sleeps has let its slots go. What an engine holds is not known any more when its last worker wakes up, or
    one that has lost its weights: it has to be looked at anew, as one that has just attached.
    """
    if state.asleep == worker.asleep:
        return False
    log.info("worker.asleep" if state.asleep else "worker.awake", worker=worker.name, touched=state.touched)
    worker.naps += state.asleep
    worker.asleep = state.asleep
    if state.asleep:
        if worker.slots is not None:
            device.withdraw(worker.slots)
        worker.slots, worker.has_slots = None, False
        return True
    if not engine.asleep or state.touched or state.content != engine.content:
        engine.change(EngineEvent.LOSE)
    worker.content, worker.digest, worker.touched = state.content, state.digest, state.touched
    return True

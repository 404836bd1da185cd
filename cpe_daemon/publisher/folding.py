"""The fold of a contribution (`cpe_daemon.core.fold`) by the GPUs that its tensors are in.

They read it at the speed of their memory, where the daemon's threads would take about as long as they copy. It then
covers every byte's whole way, from the trainer's GPU to the engines'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from cpe_daemon.core.fold import ROW_BYTES, modulo, own_bytes
from cpe_daemon.core.manifest import tensor_offset
from cpe_daemon.devices.cuda.fold import STRETCH_ALIGNMENT_BYTES, Stretch
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.reader import is_plain
from cpe_daemon.publisher.sources import Contribution

Folding = Callable[[], int]
"""Folds what it was made for; waits for what was issued on the thread's current streams, and raises `CudaError`."""


def folding_of(contribution: Contribution, gpus: Gpus) -> Folding | None:
    """Make ready to fold a contribution; None if the daemon has to: GPUs do not have all of it, or cannot.

    Raises:
        ManifestError: a shard splits an inner dimension of its tensor.
    """
    stretches: defaultdict[int, list[Stretch]] = defaultdict(list)
    for tensor, shard in zip(contribution.tensors, contribution.shards, strict=True):
        if not (nbytes := own_bytes(shard)):
            continue
        device, address = gpus.device_of(tensor), tensor.data_ptr()
        if device is None or not is_plain(tensor) or address % STRETCH_ALIGNMENT_BYTES:
            return None
        first_row = 0 if shard.start is None else tensor_offset(shard) // ROW_BYTES
        stretches[device].append(Stretch(shard.name, first_row, address, nbytes))
    if not all(gpus.folds(device) for device in stretches):
        return None
    return lambda: modulo(sum(gpus.fold(device, lie) for device, lie in stretches.items()))

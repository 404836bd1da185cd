"""The trainer's side: publish a version of a model's weights, and wait until it is served.

    with Publisher("ipc:///run/cpe/front.sock", model="policy", run="run-7") as publisher:
        handle = publisher.publish(model, version=step)  # the tensors may change again when this returns
        print(handle.live())

`Publisher` finds out what a source is (`sources`, `files`), fills chunks with it by several threads (`stream`, `runs`)
and sends them to every daemon (`outgoing`), over a `link` each, whose thread owns a `session`. `reader` finds the bytes
of a tensor, `gpus` fetches them from a GPU, `pagelock` lets it copy straight into the landing ring. `sending` is the
conversation about versions, `delivery` what is known of each, and `handle` what the trainer holds of it.
"""

from __future__ import annotations

from cpe_daemon.publisher.handle import EndpointsFailedError, Handle
from cpe_daemon.publisher.publisher import Publisher
from cpe_daemon.publisher.report import PublishReport

__all__ = ["EndpointsFailedError", "Handle", "PublishReport", "Publisher"]

"""Any torch module, dict of tensors or callback, updated in place between forward passes.

from inference_plugins.torch import attach

attachment = attach(model, engine="policy", socket="ipc:///run/cpe/engines.sock")
with attachment.lock:
    output = model(batch)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference_plugins.torch.attachment import Attachment, attach
    from inference_plugins.torch.serving_lock import ServingLock

__all__ = ["Attachment", "ServingLock", "attach"]


def __getattr__(name: str) -> object:
    """Import the worker half when it is asked for: the daemon needs only the driver half, and no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from inference_plugins.torch import attachment

    return getattr(attachment, name)

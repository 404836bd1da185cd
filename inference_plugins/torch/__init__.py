"""Any torch module, dict of tensors or callback, updated in place between forward passes.

from inference_plugins.torch import attach

attachment = attach(model, engine="policy", socket="ipc:///run/cpe/engines.sock")
with attachment.lock:
    output = model(batch)
"""

from inference_plugins.torch.attach import Attachment, attach
from inference_plugins.torch.serving_lock import ServingLock

__all__ = ["Attachment", "ServingLock", "attach"]

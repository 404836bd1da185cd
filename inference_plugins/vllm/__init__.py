"""vLLM as an engine: every published version goes live in a running server, in place.

Install cpe-daemon where vLLM is installed, and start the server with ``--weight-transfer-config '{"backend": "cpe"}'``.
What runs where: `transfer` and what it uses in the workers' processes, `endpoints` in the server's, `driver` in the
daemon's. A vLLM that is no server, as in TRL, verl or a Ray actor, is attached by the process that uses it:

from inference_plugins.vllm import attach

llm = LLM(model, weight_transfer_config=WeightTransferConfig(backend="cpe"))
attach(llm)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference_plugins.vllm.attachment import Attachment, attach, attach_async

__all__ = ["Attachment", "attach", "attach_async"]


def __getattr__(name: str) -> object:
    """Import what a process with vLLM has when it is asked for: the daemon needs the driver only, and has no vLLM."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from inference_plugins.vllm import attachment

    return getattr(attachment, name)

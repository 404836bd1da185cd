"""cpe-daemon: live weight updates for LLM inference.

A long-running daemon, one per inference node. Trainers publish new versions of a model's weights to it; it
holds them in pinned host memory and pushes them, in place, into the inference engines that run on the node's
GPUs.

This package re-exports nothing, so that importing one room never pays for another. Trainers import
`cpe_daemon.publisher`; engines import `inference_plugins`; operators run the `cpe` command.
"""

__version__ = "0.1.0"

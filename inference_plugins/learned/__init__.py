"""Learned loading: what an engine's own loader does to its parameters, found out, proved, and done without it.

An engine's Python takes some hundred microseconds for each tensor; most of what it does is to copy slices of tensors to
slices of parameters. `LearnedLoading` watches it do so (`watch`), compares the bytes that arrived with those that were
sent (`proof`), and from then on says where each tensor's bytes belong, so that the receiver copies them itself. Where
an engine makes other tensors of what was loaded, they belong where it loads to before (`benches`).
"""

from __future__ import annotations

from inference_plugins.learned.aside import unwatched
from inference_plugins.learned.loading import LearnedLoading
from inference_plugins.learned.provenance import tensors_of
from inference_plugins.learned.switch import switched_on
from inference_plugins.learned.table import Report

__all__ = ["LearnedLoading", "Report", "switched_on", "tensors_of", "unwatched"]

"""Not SGLang's kernels, which are built for CUDA."""

from placeholders import stand_in  # type: ignore[import-not-found]  # it is on the path where SGLang runs

stand_in(__name__, "0.4.10")

"""The dtypes that a manifest may name, by torch's own names, and their sizes.

Torch itself is not imported: the daemon moves bytes, and only its two ends know tensors.
"""

from __future__ import annotations

from typing import Final

from cpe_daemon.errors import ManifestError

ITEMSIZE: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element, by dtype name."""


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of ``dtype``.

    Raises:
        ManifestError: the name is not one of torch's dtypes known here.
    """
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise ManifestError(f"unknown dtype {dtype!r}; known: {', '.join(sorted(ITEMSIZE))}") from None

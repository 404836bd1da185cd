"""On which NUMA node the pages of a mapping are to lie, and on which they do: the kernel's own calls, without libnuma.

Containers often refuse them: their default profiles of system calls allow them only beside CAP_SYS_NICE.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Final

from cpe_daemon.errors import ResourceError

_CALLS: Final = {"x86_64": (237, 239), "aarch64": (235, 236)}
"""By machine: the numbers of mbind and get_mempolicy."""

_DEFAULT: Final = 0
_PREFERRED: Final = 1
_NODE_OF_ADDRESS: Final = 1 | 2
_MOST_NODES: Final = 1024
_WORD_BITS: Final = 8 * ctypes.sizeof(ctypes.c_ulong)

_libc: Final = ctypes.CDLL(None, use_errno=True)


def prefer(address: int, nbytes: int, node: int) -> None:
    """Have pages of a range that are not there yet come from a node's memory, or from another's where that is full.

    Args:
        address: of a page.
        nbytes: of the range.
        node: below 1024.

    Raises:
        ResourceError: the kernel refuses; says why.
    """
    mask = (ctypes.c_ulong * (_MOST_NODES // _WORD_BITS))()
    mask[node // _WORD_BITS] = 1 << node % _WORD_BITS
    _call(0, address, nbytes, _PREFERRED, mask, _MOST_NODES + 1, 0)


def forget(address: int, nbytes: int) -> None:
    """Take back what `prefer` said of a range, so that it is one mapping again; pages that are there stay.

    Raises:
        ResourceError: the kernel refuses; says why.
    """
    _call(0, address, nbytes, _DEFAULT, None, 0, 0)


def node_of(address: int) -> int:
    """The node that the page at ``address`` lies on; a page that is not there yet is provided.

    Raises:
        ResourceError: the kernel refuses; says why.
    """
    found = ctypes.c_int(-1)
    _call(1, ctypes.byref(found), None, 0, address, _NODE_OF_ADDRESS)
    return found.value


def memory_nodes(status: Path = Path("/proc/self/status")) -> frozenset[int]:
    """The nodes whose memory this process may have; none if the kernel does not say."""
    try:
        listed = re.search(r"^Mems_allowed_list:\s*(\S+)", status.read_text(), re.MULTILINE)
    except OSError:
        listed = None
    nodes: set[int] = set()
    for entry in listed[1].split(",") if listed else ():
        first, _, last = entry.partition("-")
        nodes.update(range(int(first), int(last or first) + 1))
    return frozenset(nodes)


def _call(which: int, *arguments: object) -> None:
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        raise ResourceError(f"nobody has said how to place memory on {platform.machine()}")
    words = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    if _libc.syscall(ctypes.c_long(numbers[which]), *words) != 0:
        name = ("mbind", "get_mempolicy")[which]
        raise ResourceError(f"{name} is refused: {os.strerror(ctypes.get_errno())}")

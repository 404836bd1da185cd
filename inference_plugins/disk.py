"""What a server loaded from its disk before any version came: the shapes of tensors, as the files say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

log: Final = logging.getLogger(__name__)


def shapes_on_disk(model: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors in a directory of safetensors.

    Args:
        model: as the server was told; what is no directory here, or has no such files, has no shapes.
    """
    found: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(Path(model).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    found[name] = tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        log.warning("the shapes of tensors in %s are not compared with the first version's: %s", model, error)
        return {}
    return found

"""Records the frames of protocol 1: ``python -m tests.data.wire_v1.record`` from the project's root.

Each file holds the header frames of `SAMPLES` for one tag, in hex, one a line. What is recorded is what a released
peer sends, so an existing file is never written again: `tests/unit/test_wire.py` decodes them for ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cpe_daemon.wire.codec import encode
from tests.data.wire_v1.samples import SAMPLES

FOLDER: Final = Path(__file__).parent


def main() -> None:
    """Write the files that are not there."""
    for tag, messages in SAMPLES.items():
        path = FOLDER / f"{tag}.hex"
        if path.exists():
            print(f"{path.name}: recorded before, kept")
            continue
        path.write_text("".join(f"{encode(message).hex()}\n" for message in messages))
        print(f"{path.name}: recorded")


if __name__ == "__main__":
    main()

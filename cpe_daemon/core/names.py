"""What models, runs and engines may be called: whatever can be typed in a command and read in a log."""

from __future__ import annotations

from cpe_daemon.errors import MisuseError


def check_names(**names: str) -> None:
    """Refuse names that nobody could type, or tell from another by looking at it; an empty one is not looked at.

    Args:
        names: by what they are of.

    Raises:
        MisuseError: one has blanks or control characters.
    """
    for what, name in names.items():
        if name and (not name.isprintable() or any(letter.isspace() for letter in name)):
            raise MisuseError(f"{what} {name!r}: a name has no blanks and no control characters")

"""What the verbs of a data's owner share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foedus.net.owner.folder import OwnerFolder


def owner_folder(path: Path | None) -> OwnerFolder:
    """The owner's folder that was named, or the usual one."""
    from foedus.net.owner.folder import OwnerFolder, default

    return OwnerFolder(default() if path is None else path)


def whoever() -> str:
    """How whoever types calls themselves, as far as the system knows."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""

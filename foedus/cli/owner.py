"""What the verbs of a data's owner share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from foedus.net.owner.folder import OwnerFolder


def owner_folder(path: Path | None) -> OwnerFolder:
    """The owner's folder that was named, or the usual one."""
    from foedus.net.owner.folder import OwnerFolder, default

    return OwnerFolder(default() if path is None else path)


def folder_in_use(path: Path | None) -> OwnerFolder:
    """As :func:`owner_folder`, of a folder that something is in: looking into one never makes it.

    Raises:
        ConfigurationError: it is not there, or is something else.
    """
    found = owner_folder(path)
    if not found.begun:
        what = "is no owner's folder: nothing that foedus writes is in it" if found.path.is_dir() else "is not there"
        raise ConfigurationError(
            f"{found.path} {what}. Write the folder that you gave to foedus join: --folder FOLDER; or begin one: "
            "foedus consent give URL"
        )
    return found


def whoever() -> str:
    """How whoever types calls themselves, as far as the system knows."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""

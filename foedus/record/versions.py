"""Which versions something was made with."""

from __future__ import annotations

import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Versions of Python, foedus and the frameworks that are installed; none of them is loaded to find out.

    Example:
        >>> {"python", "foedus", "numpy"} <= versions().keys()
        True
    """
    found = {"python": platform.python_version()}
    for package in ("foedus", "numpy", "torch", "jax"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

"""Locks between processes: held by a file, let go by the operating system however a process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from foedus.errors import ConfigurationError
from foedus.net.identity.files import private_folder

__all__ = ["alone", "in_turn", "taken"]


def taken(file: IO[Any]) -> bool:
    """Take the lock of an open file, which is held until it is closed; whether nobody else had it."""
    try:
        _lock(file.fileno(), wait=False)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def alone(path: Path, told: str) -> Iterator[None]:
    """Hold a lock file while this goes on; it ends with the process, however that ends.

    Args:
        path: of the lock file.
        told: what to say if another process holds it.

    Raises:
        ConfigurationError: another process holds it.
    """
    private_folder(path.parent)
    with open(path, "a+b") as file:
        if not taken(file):
            raise ConfigurationError(told)
        yield


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait for a lock file, and hold it while this goes on."""
    with open(path, "a+b") as file:
        _lock(file.fileno(), wait=True)
        yield


def _lock(handle: int, *, wait: bool) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    else:  # pragma: no cover
        import msvcrt

        getattr(msvcrt, "locking")(handle, getattr(msvcrt, "LK_LOCK" if wait else "LK_NBLCK"), 1)  # noqa: B009

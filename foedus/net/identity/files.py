"""Secrets on a disk: files that only their owner can read, written whole or not at all.

A key file is created with mode 0600 from its first byte (never written first and restricted after), synced, and
renamed over the old one. One that others can read is refused when it is read, as ssh does: it may have been copied
already, and its owner must know.

Not here: what the files hold (``keys.py``, ``authority.py``, ``credentials.py``).
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from foedus.errors import NotTrusted
from foedus.record.files import private_folder, storage

__all__ = ["create_once", "private_file", "private_folder", "read_secret", "write_secret"]

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_file(path: Path) -> Path:
    """Make an empty file that only its owner can read, in a folder of that kind, for a library that writes it itself;
    one that is there is left as it is."""
    if path.exists():
        return path
    private_folder(path.parent)
    with storage(path), contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return path


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, atomically and durably."""
    with storage(path):
        os.replace(_aside(path, content), path)


def create_once(path: Path, content: bytes) -> None:
    """Write such a file unless there is one: of several processes that start at once, one makes it."""
    with storage(path):
        temporary = _aside(path, content)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()


def _aside(path: Path, content: bytes) -> Path:
    """A file of mode 0600 beside a path, with the content, safe on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a left-over of a killed process of the same number
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def read_secret(path: Path) -> bytes:
    """The content of a secret file.

    Errors: `NotTrusted` if others than the owner may read it; `FileNotFoundError` as usual.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & _OTHERS:
        raise NotTrusted(
            f"{path} holds a secret and can be read by others (mode {mode:04o}). If nobody can have copied it, write: "
            f"chmod 600 {path}. Otherwise delete it, revoke what it stood for, and make a new one"
        )
    return path.read_bytes()

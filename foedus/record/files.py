"""Writing files so that a crash at any moment leaves the old content or the new, never a half."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foedus.errors import StorageError


def replace(path: Path, content: bytes) -> None:
    """Write a whole file atomically: a temporary file beside it, synced to disk, then renamed over it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with storage(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders, and needs no such thing."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Translate an operating system's error about writing ``path``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}. What was written before is intact: free some "
            "space or mend the permissions, then start the same run with the same folder, and it goes on from its "
            "last checkpoint"
        ) from error


def json_line(values: Any) -> bytes:
    """One line of JSON, the same bytes for the same values; what is not a number becomes null."""
    return (json.dumps(_plain(values), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

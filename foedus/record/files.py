"""Writing files so that a crash at any moment leaves the old content or the new, never a half."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.errors import StorageError


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can enter, and those above it that are missing (``mkdir`` would make these for
    everybody); one that is there is left as it is."""
    with storage(path):
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(exist_ok=True)  # fails where it is a file
    return path


def replace(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a whole file atomically: a temporary file beside it, synced to disk, then renamed over it. Nobody but its
    owner can read a private one, from its first byte."""
    temporary = path.with_name(f".{path.name}.tmp")
    with storage(path):
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "wb", opener=_for_owner if private else None) as file:
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


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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


def tensors(arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> bytes:
    """Arrays by name in the safetensors layout, the same bytes for the same arrays and texts.

    The layout's own library writes what is told ``about`` the arrays in an order that changes from process to
    process. Here it is sorted; readers see no difference.
    """
    from safetensors.numpy import save

    packed = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    end = 8 + int.from_bytes(packed[:8], "little")  # of the header, whose length comes first
    header = {"__metadata__": dict(sorted(about.items())), **json.loads(packed[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(packed)[end:]))


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

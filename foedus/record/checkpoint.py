"""Checkpoints: everything a run needs to go on as if it had never stopped, in one safetensors file.

Nothing is pickled: arrays lie in the safetensors layout, the rest is JSON in its metadata. A checkpoint is
written to a temporary file and renamed, so that a kill leaves the previous one. Only its owner can read it: of noise
that hangs together over rounds it holds sums without any.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import CheckpointError
from foedus.record import files

VERSION = 1


class Checkpoint(NamedTuple):
    """Arrays by dotted name, and plain values (round, file offsets, ...)."""

    arrays: dict[str, NDArray[Any]]
    values: dict[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Raises:
        StorageError: it could not be written; the previous checkpoint is still there.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    values = json.dumps(checkpoint.values)
    told = {"foedus": str(VERSION), "values": values, "digest": _digest(arrays, values)}
    files.replace(path, files.tensors(arrays, told), private=True)  # it may hold sums without noise


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises:
        CheckpointError: it is damaged, or of a later version.
    """
    arrays, told = unpacked(path)
    if told.get("foedus", "").isdecimal() and told["foedus"] != str(VERSION):
        raise CheckpointError(f"{path} has checkpoint version {told['foedus']}; this foedus reads version {VERSION}")
    if told.get("foedus") != str(VERSION) or told.get("digest") != _digest(arrays, told.get("values", "")):
        raise CheckpointError(_advice(path, "its digest does not match its content"))
    return Checkpoint(arrays, json.loads(told["values"]))


def unpacked(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays by name of a safetensors file, and what its metadata tells.

    Raises:
        CheckpointError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(_advice(path, str(error))) from error


def _advice(path: Path, reason: str) -> str:
    return f"{path} is damaged: {reason}. Restore it from a copy, or delete the run folder to start anew"


def _digest(arrays: dict[str, NDArray[Any]], values: str) -> str:
    digest = hashlib.blake2b(values.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()

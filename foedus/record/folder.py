"""The run folder: plain files that any tool can read.

    run.json            configuration, versions, executor, status
    metrics.jsonl       one line per round; no clocks in it, so that equal runs have equal bytes
    timings.jsonl       one line per round: seconds by phase, memory
    checkpoint.safetensors   what a resumed run needs
    costs.jsonl         one line per client that took part: rounds, bytes, compute, energy
    model.safetensors   the final model's parameters and buffers by name
    figures/            what plot() drew

A line of ``metrics.jsonl`` counts only up to the offset stored in the checkpoint: on resume the file is cut
there and the rounds after it are run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import CheckpointError, ConfigurationError
from foedus.record import checkpoint, files
from foedus.record.checkpoint import Checkpoint

METRICS, TIMINGS, CONFIGURATION = "metrics.jsonl", "timings.jsonl", "run.json"
CHECKPOINT, MODEL, COSTS = "checkpoint.safetensors", "model.safetensors", "costs.jsonl"


class Record(NamedTuple):
    """What a run folder tells: its configuration, a dict per round, and timings."""

    folder: Path
    configuration: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]


class RunFolder:
    """A folder being written by one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.storage(path):
            path.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> None:
        self._files = {name: open(self.path / name, "ab") for name in (METRICS, TIMINGS)}  # noqa: SIM115

    def configure(self, values: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        text = json.dumps(values, indent=2, ensure_ascii=False)
        files.replace(self.path / CONFIGURATION, text.encode() + b"\n")

    def configuration(self) -> dict[str, Any] | None:
        """What ``run.json`` says; None if there is none."""
        path = self.path / CONFIGURATION
        return _read_json(path) if path.exists() else None

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl`` or ``timings.jsonl``."""
        with files.storage(self.path / name):
            self._files[name].write(files.json_line(dict(values)))

    def checkpoint(self, state: Checkpoint) -> None:
        """Make everything so far durable: first the lines, then the checkpoint that counts them."""
        offsets = {}
        for name, file in self._files.items():
            with files.storage(self.path / name):
                file.flush()
                os.fsync(file.fileno())
                offsets[name] = file.tell()
        checkpoint.save(self.path / CHECKPOINT, state._replace(values=state.values | {"offsets": offsets}))

    def restore(self) -> Checkpoint | None:
        """The last checkpoint, with the lines after it cut off; None if there is none."""
        path = self.path / CHECKPOINT
        if not path.exists():
            self._cut(dict.fromkeys(self._files, 0))
            return None
        state = checkpoint.load(path)
        self._cut(state.values["offsets"])
        return state

    def _cut(self, offsets: Mapping[str, int]) -> None:
        for name, file in self._files.items():
            file.close()
            path = self.path / name
            if path.stat().st_size < offsets[name]:
                raise CheckpointError(
                    f"{path} is shorter than when its checkpoint was written; was it edited? Restore it, or start "
                    "anew in another folder"
                )
            os.truncate(path, offsets[name])
        self._open()

    def save_model(self, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
        """Write ``model.safetensors``."""
        from safetensors.numpy import save

        named = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        files.replace(self.path / MODEL, save(named, metadata=dict(about)))

    def save_costs(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``costs.jsonl``: one line per client that took part."""
        files.replace(self.path / COSTS, b"".join(files.json_line(dict(row)) for row in rows))

    def flush(self) -> None:
        """Let readers of the files see every line so far."""
        for name, file in self._files.items():
            with files.storage(self.path / name):
                file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read(path: str | Path) -> Record:
    """Read a run folder, finished or not.

    Raises:
        ConfigurationError: it is no run folder.
    """
    folder = Path(path)
    if not (folder / CONFIGURATION).exists():
        raise ConfigurationError(f"{folder} is no run folder: it has no {CONFIGURATION}")
    lines = {name: _lines(folder / name) for name in (METRICS, TIMINGS)}
    return Record(folder, _read_json(folder / CONFIGURATION), lines[METRICS], lines[TIMINGS])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: an object is expected")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]

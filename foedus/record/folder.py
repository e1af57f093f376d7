"""The run folder: plain files that any tool can read.

    run.json            configuration, versions, executor, status
    metrics.jsonl       one line per round; no clocks in it, so that equal runs have equal bytes
    timings.jsonl       one line per round: seconds by phase
    clients.jsonl       if asked for: one line per evaluated round and client: the global model, on the client's data
    scores.jsonl        if asked for: one line per round and client: how its update looked beside the others
    local.jsonl         if asked for: one line per round, client and local step: the client's own model, evaluated
    checkpoint.safetensors   what a resumed run needs
    costs.jsonl         one line per client that took part: rounds, bytes, compute, energy
    model.safetensors   the final model's parameters and buffers by name
    figures/            what plot() drew

A line of a ``.jsonl`` file counts only up to the offset stored in the checkpoint: on resume the file is cut
there and the rounds after it are run again. What counts must be what was written: the checkpoint holds its
digest, and a file edited by hand is refused rather than continued.

One process writes a run folder at a time; where the operating system has file locks, a second is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from numpy.typing import NDArray

from foedus.errors import CheckpointError, ConfigurationError, StorageError
from foedus.record import checkpoint, files
from foedus.record.checkpoint import Checkpoint

METRICS, TIMINGS, CONFIGURATION = "metrics.jsonl", "timings.jsonl", "run.json"
CLIENTS, LOCAL, COSTS = "clients.jsonl", "local.jsonl", "costs.jsonl"
KEPT, SCORES = "kept.sqlite", "scores.jsonl"
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"


class Record(NamedTuple):
    """What a run folder tells: its configuration, a dict per round, and timings; all else is read when asked for."""

    folder: Path
    configuration: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]

    @property
    def final(self) -> dict[str, Any]:
        """The central figures of the last evaluated round; empty if none was."""
        return next((line["central"] for line in reversed(self.metrics) if "central" in line), {})

    @property
    def clients(self) -> list[dict[str, Any]]:
        """A dict per evaluated round and client, from ``clients.jsonl``; empty if clients were not evaluated."""
        return lines(self.folder / CLIENTS)

    @property
    def scores(self) -> list[dict[str, Any]]:
        """A dict per round and client, from ``scores.jsonl``; empty without ``Settings(watch=...)``."""
        return lines(self.folder / SCORES)

    @property
    def costs(self) -> list[dict[str, Any]]:
        """A dict per client that took part, from ``costs.jsonl``; empty until the run has ended."""
        return lines(self.folder / COSTS)

    @property
    def parameters(self) -> dict[str, NDArray[Any]]:
        """The final parameters and buffers by name, from ``model.safetensors``.

        Raises:
            ConfigurationError: the run has not ended, or not its latest rounds.
            CheckpointError: the file is damaged.
        """
        return _parameters(self)


class RunFolder:
    """A folder being written by one run.

    Args:
        path: the folder; made if there is none.
        more: names of further files of lines: ``clients.jsonl``, ``local.jsonl``.

    Raises:
        StorageError: it cannot be written.
        ConfigurationError: another process is writing it.
    """

    def __init__(self, path: Path, *, more: Sequence[str] = ()) -> None:
        self.path = path
        if strangers := [p for p in (path, *path.parents) if p.exists() and not p.is_dir()]:
            raise StorageError(f"{path} could not be written: {strangers[0]} is a file. Choose another run folder")
        with files.storage(path):
            self._ours = not path.exists() or not any(path.iterdir())
            path.mkdir(parents=True, exist_ok=True)
            self._files = {name: open(path / name, "ab") for name in (METRICS, TIMINGS, *more)}  # noqa: SIM115
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._files}
        if not _locked(self._files[METRICS]):
            self.close()
            raise ConfigurationError(
                f"another process is writing {path}. Wait until it has ended, or choose another folder"
            )

    def configure(self, values: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        text = json.dumps(values, indent=2, ensure_ascii=False)
        files.replace(self.path / CONFIGURATION, text.encode() + b"\n")

    def configuration(self) -> dict[str, Any] | None:
        """What ``run.json`` says; None if there is none."""
        path = self.path / CONFIGURATION
        if path.exists():
            return _read_json(path)
        if strangers := [name for name in self._files if (self.path / name).stat().st_size]:
            raise CheckpointError(
                f"{self.path} holds {' and '.join(strangers)} but no {CONFIGURATION}, so nobody knows which run "
                "they are of. Choose another folder, or move them away"
            )
        return None

    def holds_nothing(self) -> bool:
        """Whether a run began here and failed before its first round was done: there is nothing to go on with."""
        done = (self.path / name for name in (CHECKPOINT, MODEL))
        return not any(path.exists() for path in done) and not (self.path / METRICS).stat().st_size

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a line to one of the ``.jsonl`` files."""
        line = files.json_line(dict(values))
        with files.storage(self.path / name):
            self._files[name].write(line)
        self._digests[name].update(line)

    def checkpoint(self, state: Checkpoint) -> None:
        """Make everything so far durable: first the lines, then the checkpoint that counts them."""
        lines = {}
        for name, file in self._files.items():
            with files.storage(self.path / name):
                file.flush()
                os.fsync(file.fileno())
                lines[name] = [file.tell(), self._digests[name].hexdigest()]
        checkpoint.save(self.path / CHECKPOINT, state._replace(values=state.values | {"lines": lines}))

    def restore(self) -> Checkpoint | None:
        """The last checkpoint, with the lines after it cut off; None if there is none.

        Raises:
            CheckpointError: it is damaged, or the lines before it are not those that it counted.
        """
        path = self.path / CHECKPOINT
        state = checkpoint.load(path) if path.exists() else None
        nothing = (0, hashlib.blake2b(digest_size=16).hexdigest())
        lines: Mapping[str, tuple[int, str]] = (
            dict.fromkeys(self._files, nothing) if state is None else state.values["lines"]
        )
        for name in self._files:  # all are looked at before any is cut
            self._verify(name, *lines.get(name, nothing))  # it may have had no such file before
        for name, file in self._files.items():
            with files.storage(self.path / name):
                file.truncate(lines.get(name, nothing)[0])
                file.seek(0, os.SEEK_END)
        return state

    def _verify(self, name: str, length: int, digest: str) -> None:
        self._digests[name] = hashlib.blake2b(digest_size=16)
        with open(self.path / name, "rb") as file:
            content = file.read(length)
        self._digests[name].update(content)
        if len(content) < length or self._digests[name].hexdigest() != digest:
            how = "is shorter than" if len(content) < length else "differs from what it was"
            raise CheckpointError(
                f"{self.path / name} {how} when its checkpoint was written; was it edited? Put it back as it was, "
                "or start anew in another folder"
            )

    def save_model(self, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
        """Write ``model.safetensors``; equal models are equal bytes."""
        files.replace(self.path / MODEL, files.tensors(arrays, about))

    def save_costs(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``costs.jsonl``: one line per client that took part."""
        files.replace(self.path / COSTS, b"".join(files.json_line(dict(row)) for row in rows))

    def flush(self) -> None:
        """Let readers of the files see every line so far."""
        for name, file in self._files.items():
            with files.storage(self.path / name):
                file.flush()

    def close(self) -> None:
        """Close the files. Lines since the last checkpoint may not fit on a full disk any more; they do not
        count, so that this is no further error."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def tidy(self) -> None:
        """Take away a folder, closed, in which nothing was written: of a call that failed before it began."""
        mine = [self.path / name for name in self._files]
        if not self._ours or set(self.path.iterdir()) != set(mine) or any(path.stat().st_size for path in mine):
            return
        with suppress(OSError):
            for path in mine:
                path.unlink()
            self.path.rmdir()


def new_folder(kind: str = "") -> Path:
    """A new folder under ``runs/``, named after its kind and the time; nobody else has it.

    Raises:
        StorageError: it cannot be made.
    """
    stamp = f"{kind}{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 1000):
        path = Path("runs") / (stamp if number == 1 else f"{stamp}-{number}")
        with files.storage(path), suppress(FileExistsError):  # of another run that began in the same second
            path.mkdir(parents=True)
            return path
    raise ConfigurationError("no free name for a run folder under runs/; choose one: folder=...")


def read(path: str | Path) -> Record:
    """Read a run folder, finished or not.

    Raises:
        ConfigurationError: it is no run folder.
    """
    folder = Path(path)
    if not (folder / CONFIGURATION).exists():
        raise ConfigurationError(f"{folder} is no run folder: it has no {CONFIGURATION}")
    return Record(folder, _read_json(folder / CONFIGURATION), lines(folder / METRICS), lines(folder / TIMINGS))


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line cut short by a crash is left out.

    Raises:
        CheckpointError: a line is damaged; says which.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    return [_object(line, f"{path} is damaged in line {number}") for number, line in enumerate(whole, 1)]


def _parameters(record: Record) -> dict[str, NDArray[Any]]:
    path, done = record.folder / MODEL, record.metrics[-1]["round"] if record.metrics else 0
    unfinished = "start the same run again with this folder, and it goes on to its end"
    if not path.exists():
        raise ConfigurationError(f"{record.folder} holds no {MODEL}: the run has not ended. To have one, {unfinished}")
    arrays, told = checkpoint.unpacked(path)
    if told.get("round") != str(done):
        raise ConfigurationError(
            f"{path} is the model of round {told.get('round')}, and the run has gone on to round {done} without having "
            f"ended. To have the newer one, {unfinished}"
        )
    return arrays


def _read_json(path: Path) -> dict[str, Any]:
    return _object(path.read_bytes(), f"{path} is damaged")


def _object(text: bytes, fault: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{fault}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{fault}: an object is expected, not {type(found).__name__}")
    return found


if sys.platform == "win32":

    def _locked(file: IO[bytes]) -> bool:  # Windows' locks would keep readers out
        return True

else:

    def _locked(file: IO[bytes]) -> bool:
        """Whether the file is ours alone now; the operating system ends that when the process ends."""
        import fcntl

        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems have no locks
            return True
        return True

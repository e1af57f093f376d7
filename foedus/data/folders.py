"""Own data in a folder of files per client: CSV, Parquet or NPZ.

    data/north.csv                      a file per client: its name without the ending is the client's id
    data/south.parquet
    data/east/train.csv, test.csv       or a sub-folder per client: the files train.*, validation.* and
    data/west/2023.csv, 2024.csv        test.* are these parts; any others together are for training

CSV and Parquet files are tables as in `frames.py`. In an NPZ file the array named by ``target`` holds the
targets, and all the others are the inputs, in the order of the file. Names that begin with a dot are
passed over.

Not here: writing such folders.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from foedus.core.population import Clients, Examples, Pair
from foedus.data.frames import Categories, from_frame
from foedus.errors import DataCorrupt, DataError, DataNotFound, MissingExtra

__all__ = ["from_folder"]

_ENDINGS: Final = (".csv", ".parquet", ".npz")
_HELD_OUT: Final = ("validation", "test")

T = TypeVar("T")
Entries = dict[str, dict[str, list[Path]]]  # client -> part -> files


def from_folder(
    folder: str | Path,
    *,
    target: str,
    inputs: Sequence[str] | None = None,
    categories: Categories | None = None,
    in_memory: bool = True,
    central_test: Pair | None = None,
) -> Clients:
    """One client per file or sub-folder; see the module for how files are named.

    Args:
        folder: where the clients' files lie.
        target: the column (or, in NPZ files, the array) to predict.
        inputs: the columns to use, in this order; default all others, of the first client's first file.
        categories: as for `from_frame`.
        in_memory: read everything now. If not, a client's files are read each time it takes part, for
            populations that do not fit into memory.
        central_test: examples for the server to evaluate on.

    Raises:
        DataNotFound: there are no such files.
        DataCorrupt: naming a file that cannot be read.
        DataError: naming a file whose columns do not fit.
        MissingExtra: without pyarrow (CSV, Parquet).

    Example:
        >>> from_folder("sites", target="ill").ids  # doctest: +SKIP
        ('aachen', 'bonn')
    """
    entries = _entries(Path(folder))
    if inputs is None:
        inputs = _inputs(entries, target)
    reader = partial(_read_file, target=target, inputs=inputs, categories=categories)
    read = {part: partial(_read_part, entries, reader, part) for part in ("train", *_HELD_OUT)}
    held = {part: [i for i, parts in entries.items() if parts[part]] for part in _HELD_OUT}
    if in_memory:
        return Clients.of(
            {i: read["train"](i) for i in entries},
            validation={i: read["validation"](i) for i in held["validation"]} or None,
            test={i: read["test"](i) for i in held["test"]} or None,
            central_test=central_test,
        )
    return Clients.generated(
        read["train"],
        entries,
        validation=read["validation"] if held["validation"] else None,
        test=read["test"] if held["test"] else None,
        central_test=central_test,
    )


def _entries(folder: Path) -> Entries:
    if not folder.is_dir():
        raise DataNotFound(f"There is no folder {Path(folder).absolute()}.")
    entries: Entries = {}
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        client = path.name if path.is_dir() else path.stem
        if client in entries:
            raise DataError(f"Two entries of {folder} are for the client {client!r}; one of them is {path.name}.")
        entries[client] = _parts(path)
    if not any(files for parts in entries.values() for files in parts.values()):
        raise DataNotFound(f"The folder {folder} has no files of clients ({', '.join(_ENDINGS)}).")
    return entries


def _parts(path: Path) -> dict[str, list[Path]]:
    files = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in _ENDINGS or not file.is_file():
            raise DataError(f"{file} is not a file that can be read ({', '.join(_ENDINGS)}). Move it elsewhere.")
    parts = {part: [f for f in files if path.is_dir() and f.stem == part] for part in _HELD_OUT}
    return {"train": [f for f in files if not any(f in held for held in parts.values())], **parts}


def _read_part(entries: Entries, reader: Callable[[Path], Examples], part: str, client: str) -> Examples:
    """One part of one client; no examples if it has no such files."""
    files = entries[client][part]
    if files:
        return Examples.concat([reader(file) for file in files])
    some = next(file for parts in entries.values() for files in parts.values() for file in files)
    return reader(some).take(slice(0, 0))


def _read_file(file: Path, *, target: str, inputs: Sequence[str] | None, categories: Categories | None) -> Examples:
    if file.suffix == ".npz":
        return _sound(file, lambda: _read_npz(file, target, inputs))
    table = _sound(file, lambda: _table(file))
    try:
        return from_frame(table, target=target, inputs=inputs, categories=categories).train
    except DataError as error:
        raise DataError(f"In {file}: {error}") from None


def _sound(file: Path, read: Callable[[], T]) -> T:
    """What ``read`` returns; a file that it stumbles over is named."""
    try:
        return read()
    except (DataError, MissingExtra, FileNotFoundError, PermissionError):
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # pyarrow's are ValueErrors
        raise DataCorrupt(f"{file} cannot be read: it is damaged, or cut short ({error}).") from error


def _read_npz(file: Path, target: str, inputs: Sequence[str] | None) -> Examples:
    # numpy leaves a file that it opened itself open if the archive in it is damaged
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        names = [n for n in arrays.files if n != target] if inputs is None else list(inputs)
        for name in (target, *names):
            if name not in arrays.files:
                raise DataError(f"In {file} there is no array {name!r}; there are: {arrays.files}.")
        return Examples.of({name: arrays[name] for name in names}, arrays[target])


def _table(file: Path) -> Any:
    try:
        from pyarrow import csv, parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"Reading {file.name}") from error
    return csv.read_csv(file) if file.suffix == ".csv" else parquet.read_table(file)


def _inputs(entries: Entries, target: str) -> list[str] | None:
    """The input columns of the first file, which all others must have; None for NPZ."""
    first = next(file for parts in entries.values() for files in parts.values() for file in files)
    if first.suffix == ".npz":
        return None
    return [str(n) for n in _sound(first, lambda: _table(first)).column_names if n != target]

"""A store of examples for applications: what was seen, and what came of it, logged where it happens.

An application logs a context (what a model would be given) and its outcome (what it should have said), at once or when
it is known. The store keeps the latest, forgets what is too old or too much, and offers the rest as a data set to
train on: ``foedus.join(url, data=store)``. It is an SQLite file, which several processes of one application may write
to. What is deleted is overwritten.

Not here: who may train on it (``rules.py``).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.examples import Examples
from foedus.errors import ConfigurationError, DataError, StorageError
from foedus.net.identity.files import private_file
from foedus.record.files import tensors

__all__ = ["ExampleStore"]

DAY = 86400.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS logged (
    number INTEGER PRIMARY KEY AUTOINCREMENT, moment REAL NOT NULL, context BLOB NOT NULL, outcome BLOB
);
CREATE INDEX IF NOT EXISTS by_moment ON logged (moment)
"""
_SELDOM = 64  # bytes are added up whenever so many more were logged, and before every reading


class _Kind(NamedTuple):
    """What arrays look like: all contexts are of one kind, and all outcomes."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(arrays: dict[str, NDArray[Any]]) -> _Kind:
        return _Kind(tuple((name, array.shape) for name, array in arrays.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes)


class ExampleStore:
    """Context and outcome, logged locally, offered as a data set.

    Args:
        path: of the SQLite file; made when there is none.
        expire_days: examples older than that are forgotten.
        most: at most so many examples are kept, the latest.
        most_bytes: at most so many bytes of arrays.
        clock: gives seconds since 1970.

    Example:
        >>> import tempfile
        >>> store = ExampleStore(Path(tempfile.mkdtemp()) / "keyboard.sqlite", expire_days=30, most=10_000)
        >>> _ = store.log([0.2, 0.7], 1)
        >>> later = store.log([0.9, 0.1])  # what came of it is not known yet
        >>> len(store.examples())
        1
        >>> store.outcome(later, 0)
        >>> store.examples()
        Examples(2: float32[2] -> int64)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        expire_days: float = 90.0,
        most: int = 100_000,
        most_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_number("expire_days", expire_days, above=True)
        check_whole("most", most)
        check_whole("most_bytes", most_bytes)
        self.path, self.expire_days, self.most, self.most_bytes = Path(path), expire_days, most, most_bytes
        self._clock = clock

    def log(self, context: Any, outcome: Any = None) -> int:
        """Log what was seen, and what came of it, if that is known; a number to tell it by.

        Args:
            context: an array or list of numbers, or a dict of them for a model of several inputs.
            outcome: a number or array; ``None`` if it is not known yet.

        Raises:
            DataError: it is of another shape than what was logged before, or no numbers.
        """
        arrays = _contexts(context)
        with self._opened() as database:
            self._check_kind(database, "context", arrays)
            told = None if outcome is None else self._told(database, outcome)
            row = (self._clock(), tensors(arrays, {}), told)
            cursor = database.execute("INSERT INTO logged (moment, context, outcome) VALUES (?, ?, ?)", row)
            assert cursor.lastrowid is not None
            self._forget(database, weigh=cursor.lastrowid % _SELDOM == 0)
            return cursor.lastrowid

    def outcome(self, number: int, outcome: Any) -> None:
        """Log what came of a context; one that is forgotten already stays forgotten."""
        with self._opened() as database:
            told = self._told(database, outcome)
            database.execute("UPDATE logged SET outcome = ? WHERE number = ?", (told, int(number)))

    def examples(self) -> Examples:
        """Those whose outcome is known, and that have not expired, the oldest first.

        Raises:
            DataError: there is none.
        """
        with self._opened() as database:
            self._forget(database)
            rows = database.execute(
                "SELECT context, outcome FROM logged WHERE outcome IS NOT NULL ORDER BY number"
            ).fetchall()
        if not rows:
            raise DataError(f"{self.path} holds no example with an outcome yet: store.log(context, outcome)")
        contexts = [_read(context) for context, _ in rows]
        columns = tuple(np.stack([context[name] for context in contexts]) for name in contexts[0])
        return Examples.of(columns, np.stack([_read(outcome)["outcome"] for _, outcome in rows]))

    def __len__(self) -> int:
        """How many are kept, with or without an outcome."""
        with self._opened() as database:
            self._forget(database)
            return int(database.execute("SELECT count(*) FROM logged").fetchone()[0])

    def clear(self) -> None:
        """Forget all."""
        with self._opened() as database:
            database.execute("DELETE FROM logged")

    def __repr__(self) -> str:
        return f"ExampleStore({str(self.path)!r}, expire_days={self.expire_days:g}, most={self.most})"

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The database, in one transaction."""
        try:
            with closing(sqlite3.connect(private_file(self.path), timeout=30.0)) as database, database:
                database.execute("PRAGMA secure_delete = ON")
                database.executescript(_SCHEMA)
                yield database
        except (sqlite3.OperationalError, OSError) as error:
            raise StorageError(
                f"{self.path} could not be written or read: {error}. Free some space or correct its permissions"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path} is no example store, or damaged: {error}. Restore it or choose another"
            ) from error

    def _forget(self, database: sqlite3.Connection, *, weigh: bool = True) -> None:
        """Delete what is too old or too much."""
        database.execute("DELETE FROM logged WHERE moment < ?", (self._clock() - self.expire_days * DAY,))
        database.execute(
            "DELETE FROM logged WHERE number <= (SELECT number FROM logged ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (self.most,),
        )
        if weigh:
            database.execute(
                "DELETE FROM logged WHERE number IN (SELECT number FROM (SELECT number, sum(length(context) + "
                "coalesce(length(outcome), 0)) OVER (ORDER BY number DESC) AS together FROM logged) "
                "WHERE together > ?)",
                (self.most_bytes,),
            )

    def _told(self, database: sqlite3.Connection, outcome: Any) -> bytes:
        arrays = {"outcome": _numbers("outcome", outcome)}
        self._check_kind(database, "outcome", arrays)
        return tensors(arrays, {})

    def _check_kind(self, database: sqlite3.Connection, column: str, arrays: dict[str, NDArray[Any]]) -> None:
        row = database.execute(f"SELECT {column} FROM logged WHERE {column} IS NOT NULL LIMIT 1").fetchone()
        if row is not None and (before := _Kind.of(_read(row[0]))) != _Kind.of(arrays):
            raise DataError(
                f"an example store holds examples of one kind: this {column} is {_Kind.of(arrays)}, and those in "
                f"{self.path} are {before}. Use another store, or clear() this one"
            )


def _contexts(context: Any) -> dict[str, NDArray[Any]]:
    if isinstance(context, dict):
        if not context:
            raise ConfigurationError("an example needs a context: log([0.2, 0.7], outcome), or a dict of arrays")
        return {str(name): _numbers(str(name), value) for name, value in sorted(context.items())}
    return {"x": _numbers("context", context)}


def _numbers(name: str, value: Any) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{name} is no array of numbers: {error}") from None
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} holds {array.dtype}, not numbers. Turn it into numbers first, as the model wants them")
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _read(blob: bytes) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    return dict(sorted(load(blob).items()))

"""What clients keep between their visits, while a federation is simulated on one machine.

On a real client this lies on the client. In simulation it must not lie in memory: a million clients that each keep a
vector as long as the model would fill any machine. It lies in an SQLite database in the run folder, of which only
the rows of the present cohort are read; nothing is created before a client keeps something.

A run that is killed goes back to its last checkpoint, so that what clients kept *then* must still be there: a row is
written beside the older one, and older ones go when a checkpoint has made the newer one certain.

Not here: what is kept (``core/method.py``), when (``sim/engine.py``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.errors import CheckpointError, StorageError

__all__ = ["Kept"]

Arrays = Mapping[str, NDArray[Any]]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (client INTEGER, round INTEGER, arrays BLOB, PRIMARY KEY (client, round)) WITHOUT ROWID
"""
_ASKED = 500  # clients in one question to the database


class Kept:
    """The database of what clients keep, by position and round.

    Example:
        >>> kept = Kept(path)  # doctest: +SKIP
        >>> kept.write(3, {7: {"control": np.zeros(2)}})  # doctest: +SKIP
        >>> kept.read([7])[7]["control"]  # doctest: +SKIP
        array([0., 0.])
    """

    def __init__(self, path: Path) -> None:
        self._path, self._database = path, sqlite3.connect(path) if path.exists() else None
        self._written: dict[int, int] = {}  # client → its latest round, of those whose older rows may be there still

    def read(self, clients: Iterable[int]) -> dict[int, dict[str, NDArray[Any]]]:
        """The latest that each of some clients kept; those that kept nothing are left out."""
        found: dict[int, dict[str, NDArray[Any]]] = {}
        if self._database is None:
            return found
        asked = [int(c) for c in clients]
        with self._guarded() as database:
            for at in range(0, len(asked), _ASKED):
                part = asked[at : at + _ASKED]
                marks = ",".join("?" * len(part))
                rows = database.execute(
                    f"SELECT client, max(round), arrays FROM kept WHERE client IN ({marks}) GROUP BY client",
                    part,
                )
                found |= {client: self._unpacked(blob) for client, _, blob in rows}
        return found

    def write(self, round: int, kept: Mapping[int, Arrays]) -> None:
        """What clients keep at the end of a round; a client's older arrays are replaced as a whole."""
        if not kept:
            return
        with self._guarded() as database:
            database.executemany(
                "INSERT OR REPLACE INTO kept VALUES (?, ?, ?)",
                ((int(client), round, _packed(arrays)) for client, arrays in sorted(kept.items())),
            )
        self._written |= dict.fromkeys(map(int, kept), round)

    def commit(self) -> None:
        """Make everything durable; a checkpoint may then rely on it."""
        if self._database is not None:
            with self._guarded() as database:
                database.commit()

    def settle(self, round: int) -> None:
        """Drop what no checkpoint can go back to any more: all but each client's latest up to a round.

        Looks at the clients written since the last call only; what a killed process left goes when its client is
        written again.
        """
        if self._database is None:
            return
        with self._guarded() as database:
            database.executemany(
                "DELETE FROM kept WHERE client = ? AND round < "
                "(SELECT max(round) FROM kept WHERE client = ? AND round <= ?)",
                ((client, client, round) for client in sorted(self._written)),
            )
            database.commit()
        self._written = {client: last for client, last in self._written.items() if last > round}

    def go_back(self, round: int) -> None:
        """Forget everything after a round."""
        if self._database is None:
            return
        with self._guarded() as database:
            database.execute("DELETE FROM kept WHERE round > ?", (round,))
            database.commit()

    def close(self) -> None:
        """Close the database; what came after the last checkpoint does not count."""
        if self._database is not None:
            self._database.close()
            self._database = None

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._database is None:
                self._database = sqlite3.connect(self._path)
            self._database.execute(_SCHEMA)
            yield self._database
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self._path} could not be written or read: {error}. Free some space or correct its permissions; the "
                "same call goes on from the last checkpoint"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{self._path} is damaged: {error}. Restore it from a copy, or delete the run folder to start anew"
            ) from error

    def _unpacked(self, blob: bytes) -> dict[str, NDArray[Any]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return {name: np.array(array) for name, array in load(blob).items()}
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{self._path} is damaged: {error}. Restore it from a copy, or delete the run folder to start anew"
            ) from error


def _packed(arrays: Arrays) -> bytes:
    from safetensors.numpy import save

    packed: bytes = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return packed

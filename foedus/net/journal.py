"""The agent's memory: what it must still know after its process was killed or the power went.

An SQLite file in the agent's folder, written before anything is done that it tells of:

* *held*: the encoded bytes of an update, from before the first of them is sent until its round is committed or they
  will
  never count; with them what the client keeps if they count. Sent again, they are these very bytes.
* *facts*: small values by name.

What is deleted is overwritten, so that a withdrawal leaves nothing behind.

Not here: what to do next (``protocol/session.py``), the ledger (``owner/ledger.py``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from foedus.errors import CheckpointError, StorageError

__all__ = ["Held", "Journal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS held (
    key BLOB PRIMARY KEY, run TEXT, round INTEGER, orders BLOB, task TEXT, digest BLOB, bytes BLOB, kept BLOB, sent
    INTEGER
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB)
"""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that are held, without the bytes.

    Attributes:
        key: under which they are, or were last, to be sent.
        run, round: of which round.
        orders: digest of the orders that they answer.
        task: digest of the bundle and the target, as the ledger has it.
        digest, size: of the bytes.
        keeps: whether there is something to keep if they count.
        sent: whether the ledger says already that they leave.
    """

    key: bytes
    run: str
    round: int
    orders: bytes
    task: str
    digest: bytes
    size: int
    keeps: bool = False
    sent: bool = False


class Journal:
    """The journal in a file; every call is one transaction, on the disk when it returns.

    Example:
        >>> journal = Journal(Path(":memory:"))
        >>> held = Held(key=b"k" * 16, run="heart", round=3, orders=b"", task="", digest=b"", size=3)
        >>> journal.hold(held, b"abc", None)
        >>> journal.piece(held.key, 1, 10)
        b'bc'
        >>> journal.drop(held.key)
        >>> journal.held()
        []
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "busy_timeout = 30000"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{path} could not be opened: {error}. Free some space or correct its permissions"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Restore it from a copy, or join anew in another folder"
            ) from error

    def hold(self, held: Held, content: bytes, kept: bytes | None) -> None:
        """Keep bytes before they are sent, and what the client keeps if they count."""
        row = (held.key, held.run, held.round, held.orders, held.task, held.digest, content, kept, held.sent)
        with self._guarded() as database:
            database.execute("INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def rename(self, key: bytes, new: bytes) -> None:
        """The same bytes are to be sent under another key, of a later attempt."""
        with self._guarded() as database:
            database.execute("UPDATE OR REPLACE held SET key = ?, sent = 0 WHERE key = ?", (new, key))

    def leaves(self, key: bytes) -> None:
        """The ledger says now that these bytes leave."""
        with self._guarded() as database:
            database.execute("UPDATE held SET sent = 1 WHERE key = ?", (key,))

    def held(self) -> list[Held]:
        """All that is held, the oldest round first."""
        with self._guarded() as database:
            rows = database.execute(
                "SELECT key, run, round, orders, task, digest, length(bytes), kept IS NOT NULL, sent FROM held "
                "ORDER BY round, rowid"
            ).fetchall()
        names = ("key", "run", "round", "orders", "task", "digest", "size", "keeps", "sent")
        return [
            Held(**{**dict(zip(names, row, strict=True)), "keeps": bool(row[7]), "sent": bool(row[8])}) for row in rows
        ]

    def piece(self, key: bytes, offset: int, length: int) -> bytes:
        """Some of the bytes; no more of them are read than these."""
        with self._guarded() as database:
            row = database.execute("SELECT rowid FROM held WHERE key = ?", (key,)).fetchone()
            if row is None:
                return b""
            with database.blobopen("held", "bytes", row[0], readonly=True) as blob:
                blob.seek(min(offset, len(blob)))
                return bytes(blob.read(length))

    def kept(self, key: bytes) -> bytes | None:
        """What is to be kept if these bytes count."""
        with self._guarded() as database:
            row = database.execute("SELECT kept FROM held WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def drop(self, key: bytes) -> None:
        """Delete bytes, which are counted or never will be."""
        with self._guarded() as database:
            database.execute("DELETE FROM held WHERE key = ?", (key,))

    def fact(self, name: str) -> bytes | None:
        """A small value, or ``None``."""
        with self._guarded() as database:
            row = database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def note(self, name: str, value: bytes) -> None:
        """Keep a small value."""
        with self._guarded() as database:
            database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def wipe(self) -> None:
        """Delete everything, off the disk too."""
        with self._guarded() as database:
            database.execute("DELETE FROM held")
            database.execute("DELETE FROM facts")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._database
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self._path} could not be written or read: {error}. Free some space or correct its permissions, then "
                "start again: nothing was sent that is not in it"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{self._path} is damaged: {error}. Restore it from a copy, or join anew in another folder"
            ) from error

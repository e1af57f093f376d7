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
from pathlib import Path
from typing import NamedTuple

from foedus.errors import CheckpointError, StorageError
from foedus.protocol.session import Held

__all__ = ["About", "Journal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS held (
    key BLOB PRIMARY KEY, round INTEGER, size INTEGER, digest BLOB, scale REAL, waits INTEGER,
    run TEXT, attempt INTEGER, position INTEGER, task TEXT, what TEXT, protections TEXT, sends INTEGER,
    bytes BLOB, kept BLOB
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB)
"""


class About(NamedTuple):
    """What is held besides the bytes, for the ledger and for what is kept.

    Attributes:
        run, attempt: of which run, and the last attempt under which they were to be sent.
        position: the client's.
        task: digest of the bundle, and the object in it.
        what: in plain words.
        protections: those that were promised for them.
        sends: how often the ledger says that they left.
    """

    run: str
    attempt: int
    position: int
    task: str
    what: str
    protections: tuple[str, ...] = ()
    sends: int = 0


class Journal:
    """The journal in a file; every call is one transaction, on the disk when it returns.

    Example:
        >>> journal = Journal(Path(":memory:"))
        >>> held = Held(key=b"k" * 16, round=3, size=3, digest=b"")
        >>> journal.hold(held, About("heart", 1, 0, "", "update"), b"abc", None)
        >>> journal.piece(held.key, 1, 10)
        b'bc'
        >>> journal.drop(held.key)
        >>> journal.held()
        {}
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

    def hold(self, held: Held, about: About, content: bytes, kept: bytes | None) -> None:
        """Keep bytes before they are sent, and what the client keeps if they count."""
        given = about._replace(protections="\n".join(about.protections))  # type: ignore[arg-type]
        row = (*held, *given, content, kept)
        with self._guarded() as database:
            database.execute(f"INSERT OR REPLACE INTO held VALUES ({', '.join('?' * len(row))})", row)

    def mark(self, held: Held) -> None:
        """What is known of bytes that are held has changed; not the bytes."""
        with self._guarded() as database:
            database.execute("UPDATE held SET waits = ?, scale = ? WHERE key = ?", (held.waits, held.scale, held.key))

    def rename(self, old: bytes, held: Held, attempt: int) -> None:
        """The same bytes are to be sent under another key, of a later attempt."""
        with self._guarded() as database:
            row = (held.key, attempt, held.waits, old)
            database.execute("UPDATE OR REPLACE held SET key = ?, attempt = ?, waits = ? WHERE key = ?", row)

    def leaves(self, key: bytes) -> None:
        """The ledger says once more that these bytes leave."""
        with self._guarded() as database:
            database.execute("UPDATE held SET sends = sends + 1 WHERE key = ?", (key,))

    def held(self) -> dict[bytes, Held]:
        """All that is held, by key, in the order in which it came to be."""
        with self._guarded() as database:
            rows = database.execute("SELECT key, round, size, digest, scale, waits FROM held ORDER BY rowid").fetchall()
        return {row[0]: Held(row[0], row[1], row[2], row[3], row[4], bool(row[5])) for row in rows}

    def about(self, key: bytes) -> About | None:
        """What is known of bytes that are held; ``None`` if they are not."""
        with self._guarded() as database:
            row = database.execute(f"SELECT {', '.join(About._fields)} FROM held WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        run, attempt, position, task, what, protections, sends = row
        return About(run, attempt, position, task, what, tuple(filter(None, protections.split("\n"))), sends)

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

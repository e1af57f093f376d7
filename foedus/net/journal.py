"""The agent's memory: what it must still know after its process was killed or the power went.

An SQLite file in the agent's folder, written before anything is done that it tells of:

* *held*: the encoded bytes of an update, from before the first of them is sent until its round is committed or they
  will never count; with them what the client keeps if they count. Sent again, they are these very bytes.
* *aside*: bytes with noise of their own that were given up, or are counted: should they be asked for again, it is
  these or none. They go with the next ones of their run.
* *facts*: small values by name.

What is deleted is overwritten, so that a withdrawal leaves nothing behind.

Not here: what to do next (``protocol/session.py``), the ledger (``owner/ledger.py``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from foedus.errors import CheckpointError, StorageError
from foedus.protocol.session import Held

__all__ = ["About", "Aside", "Journal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS held (
    key BLOB PRIMARY KEY, round INTEGER, size INTEGER, digest BLOB, scale REAL, waits INTEGER,
    run TEXT, attempt INTEGER, position INTEGER, task TEXT, what TEXT, protections TEXT, sends INTEGER,
    bytes BLOB, kept BLOB, release TEXT NOT NULL DEFAULT '', aside INTEGER NOT NULL DEFAULT 0
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
        release: what they are if they have noise of their own (``owner/releases.py``); else empty.
    """

    run: str
    attempt: int
    position: int
    task: str
    what: str
    protections: tuple[str, ...] = ()
    sends: int = 0
    release: str = ""


class Aside(NamedTuple):
    """Bytes that were put aside."""

    about: About
    content: bytes
    kept: bytes | None
    scale: float


_HELD = (*Held._fields, *About._fields, "bytes", "kept")


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
            self._migrate()
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{path} could not be opened: {error}. Free some space or correct its permissions"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Restore it from a copy, or join anew in another folder"
            ) from error

    def _migrate(self) -> None:
        """Columns that a journal of an earlier version has not."""
        there = {row[1] for row in self._database.execute("PRAGMA table_info(held)")}
        for name, kind in (("release", "TEXT NOT NULL DEFAULT ''"), ("aside", "INTEGER NOT NULL DEFAULT 0")):
            if name not in there:
                self._database.execute(f"ALTER TABLE held ADD COLUMN {name} {kind}")

    def hold(self, held: Held, about: About, content: bytes, kept: bytes | None) -> None:
        """Keep bytes before they are sent, and what the client keeps if they count; what was aside of earlier rounds of
        the run, or is these very bytes, is no longer needed."""
        given = about._replace(protections="\n".join(about.protections))  # type: ignore[arg-type]
        row = (*held, *given, content, kept)
        with self._guarded() as database, database:
            database.execute("BEGIN")
            database.execute(
                "DELETE FROM held WHERE aside AND run = ? AND (round < ? OR release = ?)",
                (about.run, held.round, about.release),
            )
            database.execute(
                f"INSERT OR REPLACE INTO held ({', '.join(_HELD)}) VALUES ({', '.join('?' * len(row))})", row
            )

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
            rows = database.execute(
                "SELECT key, round, size, digest, scale, waits FROM held WHERE NOT aside ORDER BY rowid"
            ).fetchall()
        return {row[0]: Held(row[0], row[1], row[2], row[3], row[4], bool(row[5])) for row in rows}

    def about(self, key: bytes) -> About | None:
        """What is known of bytes that are held; ``None`` if they are not."""
        with self._guarded() as database:
            row = database.execute(f"SELECT {', '.join(About._fields)} FROM held WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        return _about(row)

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

    def put_aside(self, key: bytes) -> None:
        """Bytes that are not to be sent any more unless they are asked for again."""
        with self._guarded() as database:
            database.execute("UPDATE held SET aside = 1 WHERE key = ?", (key,))

    def aside(self, release: str) -> Aside | None:
        """The bytes of a release that were put aside; ``None`` if there are none."""
        wanted = f"{', '.join(About._fields)}, bytes, kept, scale"
        with self._guarded() as database:
            row = database.execute(f"SELECT {wanted} FROM held WHERE aside AND release = ?", (release,)).fetchone()
        return None if row is None else Aside(_about(row[:-3]), *row[-3:])

    def forget_aside(self, task: str = "", *, run: str = "") -> None:
        """Delete what was put aside: all, or that of a bundle whose digest begins so, or of a run."""
        with self._guarded() as database:
            database.execute(
                "DELETE FROM held WHERE aside AND substr(task, 1, ?) = ? AND (? = '' OR run = ?)",
                (len(task), task, run, run),
            )

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


def _about(row: tuple[Any, ...]) -> About:
    """What is known of bytes, of a row."""
    run, attempt, position, task, what, protections, sends, release = row
    return About(run, attempt, position, task, what, tuple(filter(None, protections.split("\n"))), sends, release)

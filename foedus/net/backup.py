"""A copy of a server's folder while it runs, and its way back.

The database is copied by SQLite's own online backup, which is whole whatever is being written meanwhile; then the blobs
that it names, which never change. What lies on PostgreSQL or in an object store is backed up by their own means.

A backup holds the server's identity: whoever has it can pose as the server. Updates and sums of a round under way are
not in it, and neither is the key of the round that updates are sealed under: it has to be gone when the round is. Nor
are the rounds after it, whose models were shown all the same: whoever restores says how far runs had come
(``restored.py``).

Not here: several servers (docs/howto/deploy.md).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from foedus.errors import ConfigurationError, StorageError
from foedus.net.blobs import Blobs, open_blobs
from foedus.net.course import DECRYPTION, EVALUATION
from foedus.net.identity.files import private_folder
from foedus.net.leader import OwnFolder
from foedus.net.restored import Gap, put_gap
from foedus.net.store import Transaction, open_store
from foedus.protocol import blob

DATABASE, BLOBS, IDENTITY, NAME = "foedus.sqlite", "blobs", "identity", "server-name"
FARTHEST = 100_000  # rounds that a run may have made since its backup


def backup(folder: Path, to: Path) -> int:
    """Copy a server's folder, which may be in use; how many models are in the copy.

    Raises:
        StorageError: it cannot be read, or there is no room; nothing is left at the place.
        ConfigurationError: it is no server's folder, or there is something at the place already.
    """
    if not (folder / DATABASE).exists():
        raise ConfigurationError(
            f"{folder} is no server's folder with a database of its own: it has no {DATABASE}. A database on "
            f"PostgreSQL is copied by pg_dump, then the models (--blobs), then the folder's {IDENTITY}/"
        )
    if to.exists():
        raise ConfigurationError(f"{to} is there already; choose another place for the backup")
    private_folder(to.parent)
    aside = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))  # a copy that failed half-way is none
    try:
        models = _copied(folder, aside)
        aside.rename(to)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"{folder} could not be copied to {to}: {error}. There is no backup") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return models


def _copied(folder: Path, to: Path) -> int:
    """Copy a server's folder into an empty one; how many models."""
    with closing(sqlite3.connect(folder / DATABASE)) as here, closing(sqlite3.connect(to / DATABASE)) as there:
        here.backup(there)
        there.execute("UPDATE runs SET key = x''")
        there.commit()
        there.execute("VACUUM")  # what was overwritten is not in the file any more
    shutil.copytree(folder / IDENTITY, to / IDENTITY)
    if (folder / NAME).exists():
        shutil.copy(folder / NAME, to / NAME)
    store = open_store(f"sqlite:///{to / DATABASE}")
    with closing(store), store.begin() as rows:
        wanted = sorted({row.checkpoint for row in rows.runs()} - {""})
    source, copy = open_blobs(folder / BLOBS), open_blobs(to / BLOBS)
    for digest in wanted:
        copy.put(source.get(digest))
    return len(wanted)


def restore(backed: Path, folder: Path, reached: Mapping[str, int] | None = None) -> dict[str, Gap]:
    """Put a backup in a server's place, which must be empty, and is in nobody's use.

    Args:
        backed, folder: from where, and to where.
        reached: by run, the last round that had begun before the server was lost, or any later one. Runs with noise or
            hidden updates do not go on without it: what they released since the backup was released.

    Returns:
        For every run the backup's last round, and what was said of the last that had begun.

    Raises:
        ConfigurationError: there is something there already, the backup is none, or has no such run or round.
        CheckpointError: the backup is damaged.
    """
    if not (backed / DATABASE).exists():
        raise ConfigurationError(f"{backed} is no backup of a server: it has no {DATABASE}")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty; move what is there away, or choose another folder")
    blobs = open_blobs(backed / BLOBS)
    for digest in blobs.digests():
        blobs.get(digest)  # checked before anything is put in place
    with tempfile.TemporaryDirectory() as aside:  # a database that is opened may be written to
        shutil.copy(backed / DATABASE, aside)
        gaps = _gaps(Path(aside), blobs, reached or {})
    own = OwnFolder(folder)
    own.close()
    shutil.copytree(backed, folder, dirs_exist_ok=True)
    store = open_store(f"sqlite:///{folder / DATABASE}")
    with closing(store), store.begin() as rows:
        for run, gap in gaps.items():
            put_gap(rows, run, gap)
            rows.note("restored", {"run": run, **gap._asdict()}, time.time())
    return gaps


def _gaps(folder: Path, blobs: Blobs, reached: Mapping[str, int]) -> dict[str, Gap]:
    """The gap of every run that has begun.

    Raises:
        ConfigurationError: what is said of a run cannot be.
    """
    store = open_store(f"sqlite:///{folder / DATABASE}")
    with closing(store), store.begin() as rows:
        known = _rounds(rows, blobs)
    for run, last in reached.items():
        if run not in known:
            raise ConfigurationError(
                f"the backup has no run {run!r} ({', '.join(map(repr, known)) or 'none'}). If that run began after it "
                "was made, nothing of it is left: serve it under another name, as a run of its own"
            )
        if last - known[run] > FARTHEST:
            raise ConfigurationError(
                f"the run {run!r} was at round {known[run]} when it was backed up; that it has come to round {last} "
                "since is hardly meant"
            )
        if last < known[run]:
            raise ConfigurationError(
                f"the run {run!r} had committed round {known[run]} when it was backed up, and cannot have come to "
                f"round {last} only"
            )
    return {run: Gap(round, reached.get(run)) for run, round in known.items()}


def _rounds(rows: Transaction, blobs: Blobs) -> dict[str, int]:
    """The last committed round of every run that has begun."""
    begun = [row for row in rows.runs() if row.checkpoint and not row.name.endswith((EVALUATION, DECRYPTION))]
    told = {row.name: blob.unpack(blobs.get(row.checkpoint)).told for row in begun}
    return {run: int(json.loads(about["values"])["round"]) for run, about in told.items()}

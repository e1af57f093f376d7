"""A copy of a server's folder while it runs, and its way back.

The database is copied by SQLite's own online backup, which is whole whatever is being written meanwhile; then the blobs
that it names, which never change. What lies on PostgreSQL or in an object store is backed up by their own means.

A backup holds the server's identity: whoever has it can pose as the server. Updates and sums of a round under way are
not in it, and neither is the key of the round that updates are sealed under: it has to be gone when the round is.

Not here: several servers (docs/howto/deploy.md).
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from foedus.errors import ConfigurationError, StorageError
from foedus.net.blobs import open_blobs
from foedus.net.identity.files import private_folder
from foedus.net.leader import OwnFolder
from foedus.net.store import open_store

DATABASE, BLOBS, IDENTITY, NAME = "foedus.sqlite", "blobs", "identity", "server-name"


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


def restore(backed: Path, folder: Path) -> None:
    """Put a backup in a server's place, which must be empty, and is in nobody's use.

    Raises:
        ConfigurationError: there is something there already, or the backup is none.
        CheckpointError: the backup is damaged.
    """
    if not (backed / DATABASE).exists():
        raise ConfigurationError(f"{backed} is no backup of a server: it has no {DATABASE}")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty; move what is there away, or choose another folder")
    blobs = open_blobs(backed / BLOBS)
    for digest in blobs.digests():
        blobs.get(digest)  # checked before anything is put in place
    own = OwnFolder(folder)
    own.close()
    shutil.copytree(backed, folder, dirs_exist_ok=True)

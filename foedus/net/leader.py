"""One process of several leads: it renews its lease in a thread of its own, and is told apart by its epoch.

A process that starts again with its own folder takes up the lease that it left at once; another waits until it has run
out. Whoever leads no more finds out at the next renewal, or, before that, by the first write that fails.

Not here: the lease (``leases.py``), what leading means (``coordinator``).
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import IO, Any

from foedus.errors import ConfigurationError
from foedus.net.identity.files import private_folder
from foedus.net.leases import SECONDS, lead, leave, resign, stand
from foedus.net.locks import taken
from foedus.net.store import Lease, Store


class Leader:
    """This process's side of the lease.

    Args:
        store: shared by all server processes.
        holder: a name that no other process has.
        address: where others reach this process.
        fresh: whether what a process of the same name left may be taken up.
        seconds: how long a lease runs.

    Example:
        >>> from foedus.net.store import open_store
        >>> store = open_store("sqlite://")
        >>> one, two = (Leader(store, name, f"https://{name}:8765", fresh=False) for name in "ab")
        >>> one.renew(0.0), two.renew(0.0), two.address()
        (True, False, 'https://a:8765')
        >>> two.servers()
        ('https://a:8765', 'https://b:8765')
        >>> two.renew(60.0), one.renew(60.0), one.address(), two.epoch()
        (True, False, 'https://b:8765', 2)
        >>> store.close()
    """

    def __init__(
        self, store: Store, holder: str, address: str, *, fresh: bool, seconds: float = SECONDS
    ) -> None:  # fmt: skip
        self._store, self._holder, self._own = store, holder, address
        self._fresh, self._seconds = fresh, seconds
        self._lease: Lease | None = None
        self._servers: tuple[str, ...] = ()

    def renew(self, now: float) -> bool:
        """Take the lease or renew it; whether this process leads from now on, and did not before."""
        before = self._lease
        found = lead(self._store, self._holder, self._own, now, seconds=self._seconds, fresh=self._fresh)
        self._fresh = False
        self._lease = found
        self._servers = stand(self._store, self._holder, self._own, now)
        mine = found.holder == self._holder
        return mine and (before is None or (before.holder, before.epoch) != (found.holder, found.epoch))

    def address(self) -> str | None:
        """Where the leader is; ``None`` if it is here, and empty if nobody knows yet."""
        if self._lease is None:
            return ""
        return None if self._lease.holder == self._holder else self._lease.address

    def servers(self) -> tuple[str, ...]:
        """Where all the processes are that are there, this one too."""
        return self._servers

    def epoch(self) -> int | None:
        """What this process's writes carry; they fail if it does not lead."""
        if self._lease is None or self._lease.holder != self._holder:
            return -1
        return self._lease.epoch

    def resign(self, now: float) -> None:
        """Let another process take over at once; this one is there no more."""
        leave(self._store, self._holder)
        if self._lease is not None and self._lease.holder == self._holder:
            resign(self._store, self._lease, now)
            self._lease = None


class OwnFolder:
    """A server's folder, of which one process at a time is the owner; a second one with the same folder has another
    name."""

    def __init__(self, folder: Path) -> None:
        private_folder(folder)
        name = folder / "server-name"
        self._file: IO[Any] = open(folder / ".in-use", "ab")  # noqa: SIM115  # held until the process ends
        self.alone = taken(self._file)
        if self.alone and not name.exists():
            name.write_text(f"{socket.gethostname()}-{secrets.token_hex(4)}")
        own = name.read_text() if name.exists() else socket.gethostname()
        self.name = own if self.alone else f"{own}-{secrets.token_hex(4)}"

    def check_alone(self) -> None:
        """Refuse a second process.

        Raises:
            ConfigurationError: there is one.
        """
        if not self.alone:
            raise ConfigurationError(
                f"another server uses {self._file.name.removesuffix('.in-use')}. Stop it, choose another folder, or "
                "let both use one PostgreSQL database: database='postgresql://...'"
            )

    def close(self) -> None:
        """Let others use it."""
        self._file.close()

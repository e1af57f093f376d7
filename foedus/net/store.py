"""What a server must remember, in a database: leases, clients, runs, seats, who is counted, and the audit log.

A :class:`Store` gives transactions, and a :class:`Transaction` reads and writes rows; whatever is written in one comes
to be as a whole or not at all. It is synchronous, so that the very same coordinator runs behind HTTP, in memory and on
the simulated time of the fault tests, which put a faulty store around a real one.

Fencing: a transaction that is begun for an *epoch* first looks at the lease, and fails with
:class:`~foedus.errors.StaleEpoch` if another process has taken over since. The row is held until the transaction ends,
so that nobody can take over in between (Gray, Cheriton 1989, "Leases"; the epoch is what makes them safe when a clock
or a process stands still).

SQLite, in WAL mode and synced at every commit, is for one server process; PostgreSQL for several.

Not here: models, orders and sums (``blobs.py``), what the rows mean (``coordinator``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from foedus.errors import ConfigurationError, CountedTwice, MissingExtra, StaleEpoch, StorageError
from foedus.net.tables import AUDIT, CLIENTS, COUNTED, INVITATIONS, LEASES, LINES, METADATA, RUNS, SEATS

LEADER = "coordinator"  # the lease of whoever writes
FIRST_DIGEST = "0" * 64  # before the first line of the audit log


class Lease(NamedTuple):
    """Who may write until when: ``epoch`` grows by one with every new holder."""

    name: str
    holder: str
    address: str
    epoch: int
    expires_at: float


NEVER, UNTOLD = -1, -2  # as a client's number of examples: has never come; has come, and does not say


class Enrolled(NamedTuple):
    """A client: its position is the number that all counted randomness goes by, for ever."""

    position: int
    name: str
    key: bytes
    enrolled_at: float
    examples: int = NEVER
    revoked_at: float | None = None
    scope: str = "read train"
    silo: bool = True
    invited: bytes = b""
    population: str = ""


class InvitedRow(NamedTuple):
    """A join token's digest, and whom it lets in (``identity/directory.py``)."""

    digest: bytes
    expires_at: float
    uses: int
    scope: str
    silo: bool
    name: str = ""
    population: str = ""


class RunRow(NamedTuple):
    """A run: the round machine's state, and the digests of what lies among the blobs."""

    name: str
    identity: str
    state: bytes
    checkpoint: str = ""
    sum: str = ""
    key: bytes = b""
    changed_at: float = 0.0


class SeatRow(NamedTuple):
    """A client's place in an attempt of a round."""

    run: str
    round: int
    part: int
    attempt: int
    position: int
    key: bytes
    state: str
    about: bytes = b""


class Line(NamedTuple):
    """A line of the audit log; its digest is of the line before and of itself."""

    number: int
    at: float
    kind: str
    told: Mapping[str, Any]
    digest: str


class Transaction(Protocol):
    """Rows, read and written. Laws, held by the conformance suite: a transaction sees its own writes; nobody else does
    before it has ended; one that ends with an exception has written nothing."""

    def lease(self, name: str) -> Lease | None: ...
    def put_lease(self, lease: Lease) -> None: ...
    def leases(self) -> list[Lease]: ...
    def forget_lease(self, name: str) -> None: ...

    def clients(self) -> list[Enrolled]: ...
    def client(self, name: str) -> Enrolled | None: ...
    def client_of(self, key: bytes) -> Enrolled | None: ...
    def revoked(self) -> list[str]: ...
    def enrol(self, name: str, key: bytes, now: float) -> Enrolled: ...
    def put_client(self, client: Enrolled) -> None: ...
    def invitation(self, digest: bytes) -> InvitedRow | None: ...
    def put_invitation(self, row: InvitedRow) -> None: ...

    def runs(self) -> list[RunRow]: ...
    def run(self, name: str) -> RunRow | None: ...
    def put_run(self, row: RunRow) -> None: ...

    def seats(self, run: str, since: int = 0) -> list[SeatRow]: ...
    def seat(self, key: bytes) -> SeatRow | None: ...
    def put_seats(self, rows: Iterable[SeatRow]) -> None: ...
    def forget_seats(self, run: str, before: int) -> None: ...

    def count(self, run: str, round: int, positions: Iterable[int], *, part: int = 0) -> None: ...
    def counted(self, run: str, round: int, *, part: int = 0) -> set[int]: ...

    def put_line(self, run: str, file: str, round: int, text: str) -> None: ...
    def lines(self, run: str, file: str, after: int = 0) -> list[tuple[int, str]]: ...

    def note(self, kind: str, told: Mapping[str, Any], now: float) -> Line: ...
    def notes(self, after: int = 0, limit: int = 1000) -> list[Line]: ...


class Store(Protocol):
    """A database. ``begin(epoch)`` gives a transaction, fenced by the lease's epoch where one is given."""

    def begin(self, epoch: int | None = None) -> AbstractContextManager[Transaction]: ...

    def close(self) -> None: ...


def open_store(url: str) -> SqlStore:
    """Open a database, and bring its tables to this version.

    Args:
        url: ``"sqlite:///folder/foedus.sqlite"``, ``"sqlite://"`` for one in memory, or
            ``"postgresql://user@host/database"``.

    Raises:
        StorageError: it cannot be reached or written.
        ConfigurationError: there is no such kind of database.
        MissingExtra: PostgreSQL without ``pip install 'foedus[postgres]'``.

    Example:
        >>> store = open_store("sqlite://")
        >>> with store.begin() as rows:
        ...     rows.enrol("hospital a", b"", now=0.0).position
        0
        >>> store.close()
    """
    engine = _engine(url)
    with _translated(url):
        _migrated(engine)
    return SqlStore(engine)


class SqlStore:
    """A :class:`Store` in an SQL database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @contextmanager
    def begin(self, epoch: int | None = None) -> Iterator[SqlTransaction]:
        """A transaction; with an epoch, only as long as the lease is of that epoch.

        Raises:
            StaleEpoch: another process has taken over; nothing was written.
            StorageError: the database cannot be reached or written; nothing was written.
        """
        with _translated(str(self._engine.url)), self._engine.begin() as connection:
            rows = SqlTransaction(connection)
            if epoch is not None:
                rows.fence(epoch)
            yield rows

    @property
    def engine(self) -> sa.Engine:
        """The database itself, for what lies beside these rows (``brokers/partials.py``)."""
        return self._engine

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()


class SqlTransaction:
    """A :class:`Transaction` on one connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    # --- leases

    def fence(self, epoch: int) -> None:
        """Hold the lease's row until the transaction ends.

        Raises:
            StaleEpoch: it is of another epoch.
        """
        found = self._connection.execute(
            sa.select(LEASES.c.epoch, LEASES.c.holder).where(LEASES.c.name == LEADER).with_for_update(read=True)
        ).first()
        if found is None or found.epoch != epoch:
            told = "nobody holds it" if found is None else f"{found.holder} holds it with epoch {found.epoch}"
            raise StaleEpoch(
                f"this process writes with epoch {epoch} of the lease, and {told} now: another server has taken over. "
                "Nothing was written"
            )

    def lease(self, name: str) -> Lease | None:
        found = self._connection.execute(sa.select(LEASES).where(LEASES.c.name == name).with_for_update()).first()
        return None if found is None else Lease(*found)

    def put_lease(self, lease: Lease) -> None:
        self._put(LEASES, lease._asdict(), (LEASES.c.name == lease.name,))

    def leases(self) -> list[Lease]:
        """All of them, whether they have run out or not."""
        return [Lease(*row) for row in self._connection.execute(sa.select(LEASES).order_by(LEASES.c.name))]

    def forget_lease(self, name: str) -> None:
        self._connection.execute(sa.delete(LEASES).where(LEASES.c.name == name))

    # --- clients

    def clients(self) -> list[Enrolled]:
        return [Enrolled(*row) for row in self._connection.execute(sa.select(CLIENTS).order_by(CLIENTS.c.position))]

    def client(self, name: str) -> Enrolled | None:
        found = self._connection.execute(sa.select(CLIENTS).where(CLIENTS.c.name == name)).first()
        return None if found is None else Enrolled(*found)

    def client_of(self, key: bytes) -> Enrolled | None:
        """The client of a public key."""
        found = self._connection.execute(sa.select(CLIENTS).where(CLIENTS.c.key == key)).first()
        return None if found is None else Enrolled(*found)

    def revoked(self) -> list[str]:
        """The names of those who are let in no more."""
        asked = sa.select(CLIENTS.c.name).where(CLIENTS.c.revoked_at.is_not(None))
        return list(self._connection.execute(asked).scalars())

    def enrol(self, name: str, key: bytes, now: float) -> Enrolled:
        """A new client, with the next position.

        Raises:
            ConfigurationError: the name is taken.
        """
        if self.client(name) is not None:
            raise ConfigurationError(f"a client called {name!r} is enrolled already; choose another name")
        last = self._connection.execute(sa.select(sa.func.max(CLIENTS.c.position))).scalar()
        client = Enrolled(0 if last is None else last + 1, name, key, now)
        self._connection.execute(CLIENTS.insert().values(**client._asdict()))
        return client

    def put_client(self, client: Enrolled) -> None:
        self._put(CLIENTS, client._asdict(), (CLIENTS.c.position == client.position,))

    def invitation(self, digest: bytes) -> InvitedRow | None:
        """An invitation; nobody else can spend it before this transaction has ended."""
        asked = sa.select(INVITATIONS).where(INVITATIONS.c.digest == digest).with_for_update()
        found = self._connection.execute(asked).first()
        return None if found is None else InvitedRow(*found)

    def put_invitation(self, row: InvitedRow) -> None:
        self._put(INVITATIONS, row._asdict(), (INVITATIONS.c.digest == row.digest,))

    # --- runs, seats, who is counted

    def runs(self) -> list[RunRow]:
        return [RunRow(*row) for row in self._connection.execute(sa.select(RUNS).order_by(RUNS.c.name))]

    def run(self, name: str) -> RunRow | None:
        found = self._connection.execute(sa.select(RUNS).where(RUNS.c.name == name)).first()
        return None if found is None else RunRow(*found)

    def put_run(self, row: RunRow) -> None:
        self._put(RUNS, row._asdict(), (RUNS.c.name == row.name,))

    def seats(self, run: str, since: int = 0) -> list[SeatRow]:
        """The seats of a run's rounds from one on, in the order of rounds, attempts and positions."""
        asked = sa.select(SEATS).where(SEATS.c.run == run, SEATS.c.round >= since)
        asked = asked.order_by(SEATS.c.round, SEATS.c.part, SEATS.c.attempt, SEATS.c.position)
        return [SeatRow(*row) for row in self._connection.execute(asked)]

    def seat(self, key: bytes) -> SeatRow | None:
        found = self._connection.execute(sa.select(SEATS).where(SEATS.c.key == key)).first()
        return None if found is None else SeatRow(*found)

    def put_seats(self, rows: Iterable[SeatRow]) -> None:
        values = [row._asdict() for row in rows]
        if values:
            own = ("run", "round", "part", "attempt", "position")
            self._connection.execute(self._upsert(SEATS, own), values)

    def forget_seats(self, run: str, before: int) -> None:
        self._connection.execute(SEATS.delete().where(SEATS.c.run == run, SEATS.c.round < before))
        self._connection.execute(COUNTED.delete().where(COUNTED.c.run == run, COUNTED.c.round < before))

    def count(self, run: str, round: int, positions: Iterable[int], *, part: int = 0) -> None:
        """Write down whose updates are in the model of a round.

        Raises:
            CountedTwice: one of them is already.
        """
        values = [{"run": run, "round": round, "part": part, "position": int(p)} for p in positions]
        if not values:
            return
        try:
            self._connection.execute(COUNTED.insert(), values)
        except IntegrityError as error:
            raise CountedTwice(
                f"a client is in the model of round {round} of the run {run!r} already; nothing was written"
            ) from error

    def counted(self, run: str, round: int, *, part: int = 0) -> set[int]:
        where = COUNTED.c.run == run, COUNTED.c.round == round, COUNTED.c.part == part
        return set(self._connection.execute(sa.select(COUNTED.c.position).where(*where)).scalars())

    # --- the record

    def put_line(self, run: str, file: str, round: int, text: str) -> None:
        """Write a round's line of one of the record's files, in place of the one that was there."""
        where = LINES.c.run == run, LINES.c.file == file, LINES.c.round == round
        self._put(LINES, {"run": run, "file": file, "round": round, "text": text}, where)

    def lines(self, run: str, file: str, after: int = 0) -> list[tuple[int, str]]:
        """The lines of a file of the record, of the rounds after one."""
        asked = sa.select(LINES.c.round, LINES.c.text).where(LINES.c.run == run, LINES.c.file == file)
        asked = asked.where(LINES.c.round > after).order_by(LINES.c.round)
        return [(row.round, row.text) for row in self._connection.execute(asked)]

    # --- the audit log

    def note(self, kind: str, told: Mapping[str, Any], now: float) -> Line:
        """Add a line to the audit log."""
        asked = sa.select(AUDIT.c.number, AUDIT.c.digest).order_by(AUDIT.c.number.desc()).limit(1)
        last = self._connection.execute(asked).first()
        number, before = (1, FIRST_DIGEST) if last is None else (last.number + 1, last.digest)
        text = json.dumps(dict(told), sort_keys=True, ensure_ascii=False)
        line = Line(number, now, kind, told, _digest(before, number, now, kind, text))
        self._connection.execute(AUDIT.insert().values(**line._asdict() | {"told": text}))
        return line

    def notes(self, after: int = 0, limit: int = 1000) -> list[Line]:
        """Lines of the audit log after a number."""
        asked = sa.select(AUDIT).where(AUDIT.c.number > after).order_by(AUDIT.c.number).limit(limit)
        found = self._connection.execute(asked)
        return [Line(row.number, row.at, row.kind, json.loads(row.told), row.digest) for row in found]

    # --- writing

    def _put(self, table: sa.Table, values: Mapping[str, Any], where: Sequence[sa.ColumnElement[bool]]) -> None:
        if not self._connection.execute(table.update().where(*where).values(**values)).rowcount:
            self._connection.execute(table.insert().values(**values))

    def _upsert(self, table: sa.Table, own: Sequence[str]) -> Any:
        """Insert rows, or replace those that are there."""
        if self._connection.dialect.name == "postgresql":
            from sqlalchemy.dialects.postgresql import insert as postgres

            told: Any = postgres(table)
        else:
            from sqlalchemy.dialects.sqlite import insert as sqlite

            told = sqlite(table)
        others = {c.name: told.excluded[c.name] for c in table.columns if c.name not in own}
        return told.on_conflict_do_update(index_elements=list(own), set_=others)


def check_log(lines: Iterable[Line], before: str = FIRST_DIGEST) -> str:
    """The digest of the last of some lines of the audit log, which follow each other; ``before`` is that of the line
    before them.

    Raises:
        StorageError: a line was changed, or one is missing.
    """
    for line in lines:
        text = json.dumps(dict(line.told), sort_keys=True, ensure_ascii=False)
        if line.digest != _digest(before, line.number, line.at, line.kind, text):
            raise StorageError(f"the audit log is damaged: line {line.number} is not what was written")
        before = line.digest
    return before


def _digest(before: str, number: int, at: float, kind: str, text: str) -> str:
    return hashlib.sha256(json.dumps([before, number, repr(at), kind, text]).encode()).hexdigest()


# --- opening a database -------------------------------------------------------------------------------------


def _engine(url: str) -> sa.Engine:
    if url.startswith("sqlite"):
        return _sqlite(url)
    if url.startswith(("postgresql://", "postgres://")):
        try:
            import psycopg  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtra("psycopg", "postgres", f"The database {_hidden(url)}") from error
        return sa.create_engine("postgresql+psycopg://" + url.partition("://")[2], pool_pre_ping=True)
    raise ConfigurationError(
        f"database={_hidden(url)!r} names no database that foedus knows: write sqlite:///folder/foedus.sqlite, or "
        "postgresql://user@host/database"
    )


def _sqlite(url: str) -> sa.Engine:
    path = url.partition("sqlite:///")[2]
    if path:
        with _translated(url):
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"{path} cannot be made: {error}") from error
        engine = sa.create_engine(url, connect_args={"timeout": 30})
    else:  # one connection for all, or each would have a database of its own
        engine = sa.create_engine(url, poolclass=sa.StaticPool, connect_args={"check_same_thread": False})

    def opened(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sa.event.listen(engine, "connect", opened)
    sa.event.listen(engine, "begin", begun)
    return engine


def _migrated(engine: sa.Engine) -> None:
    """Bring the tables to this version; several processes may try at once."""
    from alembic import command
    from alembic.config import Config

    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7300131)")
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """A database's errors, as ours."""
    try:
        yield
    except DBAPIError as error:
        raise StorageError(
            f"the database {_hidden(url)} could not be read or written: {error.orig}. Nothing of this step was written"
        ) from error
    except SQLAlchemyError as error:
        raise StorageError(f"the database {_hidden(url)} could not be used: {error}") from error


def _hidden(url: str) -> str:
    """An address without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url.partition("://")[0] + "://…"


__all__ = [
    "LEADER", "METADATA", "Enrolled", "InvitedRow", "Lease", "Line", "RunRow", "SeatRow", "SqlStore", "SqlTransaction",
    "Store", "Transaction", "check_log", "open_store",
]  # fmt: skip

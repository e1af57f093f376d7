"""Partial sums in the database: what makes at-least-once delivery count once.

A worker owns a partition under an *epoch*, which grows with every owner; every write names it, and fails once another
has taken over (`StaleEpoch`). One write is one transaction: the offset to go on at, the digests of the partial sums,
and who is in them or was refused. So after any crash the sum holds exactly the records before the offset. That a client
counts once in a step is a primary key, which holds across partitions, too.

A *step* is what is summed up by itself: a run, a round, and a number within it (its attempt).

The sums themselves are blobs, written before and encrypted by whoever writes them: a sum of few is nearly an update.

Not here: merging (``aggregation.py``); what a step is (``net/learning.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from foedus.errors import CountedTwice, StaleEpoch, StorageError
from foedus.net.tables import GATHERED, PARTIALS, PARTITIONS

__all__ = ["Gathered", "Owned", "Partial", "Partials"]

Step = tuple[str, int, int]


class Owned(NamedTuple):
    """A partition that is a worker's, under an epoch; where it goes on."""

    partition: int
    epoch: int
    offset: int


class Gathered(NamedTuple):
    """One client's update in a step, as a worker found it.

    Attributes:
        position: whose.
        key: of its seat.
        refused: why it was left out; empty if it is in the sum.
        version, scale: what it trained from, what it was scaled by.
    """

    position: int
    key: bytes
    refused: str = ""
    version: int = 0
    scale: float = 1.0


class Partial(NamedTuple):
    """The sum of a step that one partition's records gave: a blob's digest."""

    partition: int
    sum: str


class Partials:
    """Partial sums, who is in them, and where partitions go on.

    Args:
        engine: of a database that has the store's tables.
        topic: whose partitions these are.
    """

    def __init__(self, engine: sa.Engine, topic: str) -> None:
        self._engine, self._topic = engine, topic

    # --- workers

    def own(self, partition: int) -> Owned:
        """Take a partition over: whoever had it can write no more."""
        here = (PARTITIONS.c.topic == self._topic, PARTITIONS.c.partition == partition)
        with _translated(), self._engine.begin() as connection:
            found = connection.execute(sa.select(PARTITIONS).where(*here).with_for_update()).first()
            if found is None:
                values = {"topic": self._topic, "partition": partition, "epoch": 1, "next": 0}
                connection.execute(PARTITIONS.insert().values(**values))
                return Owned(partition, 1, 0)
            connection.execute(PARTITIONS.update().where(*here).values(epoch=found.epoch + 1))
            return Owned(partition, found.epoch + 1, found.next)

    def write(
        self, owned: Owned, offset: int, *, sums: Mapping[Step, str], gathered: Mapping[Step, Sequence[Gathered]]
    ) -> list[str]:
        """Go on to an offset, with the sums of the records before it; digests of blobs that nobody needs any more.

        Args:
            owned: the partition, under this worker's epoch.
            offset: the next to be read.
            sums: digests of the steps' sums, where they have changed.
            gathered: who was added to each, or refused, since the last write.

        Errors: `StaleEpoch` if another worker has the partition; `CountedTwice` if a client is in a step's sum already.
        Nothing was written then.
        """
        here = (PARTITIONS.c.topic == self._topic, PARTITIONS.c.partition == owned.partition)
        with _translated(), self._engine.begin() as connection:
            change = PARTITIONS.update().where(*here, PARTITIONS.c.epoch == owned.epoch).values(next=offset)
            if connection.execute(change).rowcount != 1:
                raise StaleEpoch(
                    f"partition {owned.partition} of {self._topic!r} has another worker by now; what this one has not "
                    "written is read again there"
                )
            rows = [
                _row(step, each) | {"partition": owned.partition} for step, found in gathered.items() for each in found
            ]
            if rows:
                connection.execute(GATHERED.insert(), rows)
            return [old for step, digest in sums.items() if (old := self._put(connection, step, owned, digest))]

    def _put(self, connection: sa.Connection, step: Step, owned: Owned, digest: str) -> str:
        here = (
            *_of(PARTIALS, step),
            PARTIALS.c.topic == self._topic,
            PARTIALS.c.partition == owned.partition,
        )
        old: str | None = connection.execute(sa.select(PARTIALS.c.sum).where(*here)).scalar()
        run, round, part = step
        values = {"run": run, "round": round, "part": part, "topic": self._topic, "partition": owned.partition}
        if old is None:
            connection.execute(PARTIALS.insert().values(**values, sum=digest))
            return ""
        connection.execute(PARTIALS.update().where(*here).values(sum=digest))
        return old if old != digest else ""

    def sum(self, step: Step, partition: int) -> str:
        """The digest of a step's sum from one partition; empty if there is none."""
        asked = sa.select(PARTIALS.c.sum).where(
            *_of(PARTIALS, step), PARTIALS.c.topic == self._topic, PARTIALS.c.partition == partition
        )
        with _translated(), self._engine.connect() as connection:
            return connection.execute(asked).scalar() or ""

    # --- the coordinator

    def gathered(self, step: Step) -> list[Gathered]:
        """Who has come in a step, from all partitions."""
        asked = sa.select(GATHERED).where(*_of(GATHERED, step)).order_by(GATHERED.c.position)
        with _translated(), self._engine.connect() as connection:
            return [Gathered(r.position, r.key, r.refused, r.version, r.scale) for r in connection.execute(asked)]

    def whole(self, step: Step) -> tuple[list[Partial], list[Gathered]]:
        """A step's sums and who is in them, of one moment."""
        sums = sa.select(PARTIALS).where(*_of(PARTIALS, step)).order_by(PARTIALS.c.topic, PARTIALS.c.partition)
        who = sa.select(GATHERED).where(*_of(GATHERED, step)).order_by(GATHERED.c.position)
        with _translated(), self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            partials = [Partial(row.partition, row.sum) for row in connection.execute(sums)]
            found = [Gathered(r.position, r.key, r.refused, r.version, r.scale) for r in connection.execute(who)]
        return partials, found

    def forget_before(self, step: Step) -> list[str]:
        """Remove what is kept of a run's steps before this one; the digests of their sums."""
        with _translated(), self._engine.begin() as connection:
            gone = sa.select(PARTIALS.c.sum).where(_before(PARTIALS, step))
            found = list(connection.execute(gone).scalars())
            for table in (PARTIALS, GATHERED):
                connection.execute(table.delete().where(_before(table, step)))
        return found


def _of(table: sa.Table, step: Step) -> Iterable[sa.ColumnElement[bool]]:
    run, round, part = step
    return table.c.run == run, table.c.round == round, table.c.part == part


def _before(table: sa.Table, step: Step) -> sa.ColumnElement[bool]:
    run, round, part = step
    earlier = sa.or_(table.c.round < round, sa.and_(table.c.round == round, table.c.part < part))
    return sa.and_(table.c.run == run, earlier)


def _row(step: Step, each: Gathered) -> dict[str, object]:
    run, round, part = step
    return {"run": run, "round": round, "part": part, **each._asdict()}


@contextmanager
def _translated() -> Iterator[None]:
    """A database's errors, as ours."""
    try:
        yield
    except IntegrityError as error:
        raise CountedTwice(
            "a client is in a sum of this step already, from another partition; nothing was written"
        ) from error
    except DBAPIError as error:
        raise StorageError(f"the database could not be read or written: {error.orig}; it is tried again") from error

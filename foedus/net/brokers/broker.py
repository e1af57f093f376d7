"""What a broker must do: keep records in order, per partition, and share the partitions among the workers of a group.

Laws, held by one conformance suite for all of them:

- what was published is read by every group, in order within its partition, at least once;
- records of one key are in one partition;
- a partition is one worker's at a time; whoever gets it is asked where to begin, and whoever loses it is told so;
- nothing is remembered of what a group has read: where to begin is the database's business (``partials.py``).

Not here: `MemoryBroker` (``memory.py``), `KafkaBroker` (``kafka.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["Broker", "Consumer", "Record", "Shares"]

LARGEST = 4096  # bytes of a record's value


class Record(NamedTuple):
    """One record.

    Attributes:
        partition, offset: its place; offsets grow by at least one.
        key: records of one key are in one partition.
        value: at most 4 KB.
    """

    partition: int
    offset: int
    key: bytes
    value: bytes


class Shares(NamedTuple):
    """What a worker does when it gets and loses partitions; called within `Consumer.poll`.

    Attributes:
        gained: a partition is this worker's from now on; the offset to begin at.
        lost: it is no longer; nothing more of it may be written.
    """

    gained: Callable[[int], int]
    lost: Callable[[int], None]


class Consumer(Protocol):
    """One worker's reading."""

    def poll(self, timeout_s: float) -> Sequence[Record]:
        """The next records of this worker's partitions; none if nothing comes in time."""

    def back(self, partition: int, offset: int) -> None:
        """Read a partition of this worker's again from an offset."""

    def close(self) -> None:
        """Give the partitions to the others of the group."""


class Broker(Protocol):
    """A log of records."""

    def publish(self, topic: str, key: bytes, value: bytes) -> None:
        """Return once the broker has it for good; raises `StorageError` if it does not."""

    def consume(self, topic: str, group: str, shares: Shares) -> Consumer:
        """Read a topic as one of a group."""

    def close(self) -> None:
        """Give up connections."""

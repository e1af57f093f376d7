"""A broker within one process: what Kafka does, without Kafka. For tests, and for all roles in one process.

Not here: anything that outlives the process.
"""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict
from collections.abc import Sequence

from foedus.errors import ConfigurationError, StorageError
from foedus.net.brokers.broker import LARGEST, Record, Shares

__all__ = ["MemoryBroker"]

_AT_ONCE = 500


class MemoryBroker:
    """Records in lists.

    Example:
        >>> broker = MemoryBroker(partitions=2)
        >>> broker.publish("receipts", b"client 1", b"...")
        >>> reader = broker.consume("receipts", "workers", Shares(lambda partition: 0, lambda partition: None))
        >>> [record.key for record in reader.poll(1.0)]
        [b'client 1']

    Args:
        partitions: of every topic.
    """

    def __init__(self, *, partitions: int = 4) -> None:
        if partitions < 1:
            raise ConfigurationError(f"a topic has at least one partition, not {partitions}")
        self._partitions = partitions
        self._logs: dict[str, list[list[Record]]] = defaultdict(lambda: [[] for _ in range(partitions)])
        self._groups: dict[tuple[str, str], list[_Reader]] = defaultdict(list)
        self._changed = threading.Condition()
        self._closed = False

    def publish(self, topic: str, key: bytes, value: bytes) -> None:
        """Keep a record."""
        if len(value) > LARGEST:
            raise ConfigurationError(f"a record has at most {LARGEST} bytes, not {len(value)}; bytes go elsewhere")
        with self._changed:
            if self._closed:
                raise StorageError("the broker in memory is closed; what was not read is gone")
            partition = zlib.crc32(key) % self._partitions
            log = self._logs[topic][partition]
            log.append(Record(partition, len(log), key, value))
            self._changed.notify_all()

    def consume(self, topic: str, group: str, shares: Shares) -> _Reader:
        """Read a topic as one of a group."""
        with self._changed:
            reader = _Reader(self, (topic, group), shares)
            self._groups[topic, group].append(reader)
            self._changed.notify_all()
        return reader

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _share(self, reader: _Reader) -> set[int]:
        """Which partitions are a reader's: every n-th of them."""
        readers = self._groups[reader.of]
        if reader not in readers:
            return set()
        return set(range(readers.index(reader), self._partitions, len(readers)))


class _Reader:
    """One worker's reading; used in one thread."""

    def __init__(self, broker: MemoryBroker, of: tuple[str, str], shares: Shares) -> None:
        self._broker, self.of, self._shares = broker, of, shares
        self.at: dict[int, int] = {}  # partition → next offset

    def poll(self, timeout_s: float) -> Sequence[Record]:
        """The next records, in turn from all partitions."""
        changed = self._broker._changed
        with changed:
            self._rebalance()
            changed.wait_for(lambda: self._waiting() or self._broker._closed, timeout_s)
            self._rebalance()
            found: list[Record] = []
            for partition, offset in self.at.items():
                log = self._broker._logs[self.of[0]][partition]
                found += log[offset : offset + _AT_ONCE]
                self.at[partition] = min(len(log), offset + _AT_ONCE)
            return found

    def back(self, partition: int, offset: int) -> None:
        """Read again from an offset."""
        if partition in self.at:
            self.at[partition] = offset

    def close(self) -> None:
        """Give the partitions to the others."""
        with self._broker._changed:
            if self in self._broker._groups[self.of]:
                self._broker._groups[self.of].remove(self)
            self._rebalance()
            self._broker._changed.notify_all()

    def _rebalance(self) -> None:
        """Let go of what is another's now; take what is this one's, once the other has let go."""
        mine = self._broker._share(self)
        for partition in set(self.at) - mine:
            del self.at[partition]
            self._shares.lost(partition)
            self._broker._changed.notify_all()
        others = {p for r in self._broker._groups[self.of] if r is not self for p in r.at}
        for partition in sorted(mine - set(self.at) - others):
            self.at[partition] = self._shares.gained(partition)

    def _waiting(self) -> bool:
        logs = self._broker._logs[self.of[0]]
        others = {p for r in self._broker._groups[self.of] if r is not self for p in r.at}
        mine = self._broker._share(self)
        unread = any(len(logs[p]) > offset for p, offset in self.at.items())
        return unread or bool((set(self.at) - mine) | (mine - set(self.at) - others))

"""An aggregation worker: reads receipts, fetches the bytes they stand for, checks and merges them, writes partial sums.

It holds, for every partition that is its own, the sums of the steps under way. `step` reads and merges a batch of
records; `flush` writes all of it as one transaction per partition. Whatever is not written when the worker dies, or
loses a partition, is read again by whoever has the partition next, from the offset that was written with the sum.

Bytes that are gone (a gateway that died had them in memory) are no error: the client keeps its own, and is asked again.

Not here: sums (`Summing` is made of ``net/learning.py``), threads and processes (``net/roles.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from foedus.errors import CountedTwice, MalformedMessage, ProtocolError, StaleEpoch, UpdateRefused
from foedus.net.brokers.broker import Broker, Record, Shares
from foedus.net.brokers.partials import Gathered, Owned, Partials, Step
from foedus.net.brokers.receipts import Receipt

__all__ = ["Keep", "Summing", "Worker"]


class Summing(Protocol):
    """The sum of a step under way, on one partition."""

    def take(self, receipt: Receipt, content: bytes) -> None:
        """Check an update and merge it; raises `UpdateRefused` or `ProtocolError`, and is as it was then."""

    def content(self) -> bytes:
        """The sum as it may lie among the blobs: encrypted, unless enough are in it."""


class Keep(Protocol):
    """What a worker needs of the world.

    Laws: ``sum`` gives the same for the same bytes; ``fetch`` checks size and digest; what is put has a digest that
    nobody else's has (it is encrypted, with a nonce of its own), so that it may be removed again.
    """

    def fetch(self, receipt: Receipt) -> bytes | None:
        """The bytes of a receipt; None if they are gone."""

    def release(self, receipt: Receipt) -> None:
        """The bytes of a receipt are in a sum that was written, or refused: they may go."""

    def sum(self, step: Step, partition: int, content: bytes | None) -> Summing | None:
        """A sum to go on with, from what was written or from nothing; None if the step is over."""

    def put(self, content: bytes) -> str:
        """Keep a sum among the blobs; its digest."""

    def get(self, digest: str) -> bytes:
        """A sum that was put."""

    def remove(self, digest: str) -> None:
        """A sum that nobody needs any more."""


@dataclass
class _Partition:
    """What a worker has read of a partition and not yet written."""

    owned: Owned
    next: int
    sums: dict[Step, Summing | None] = field(default_factory=dict)
    known: dict[Step, set[int]] = field(default_factory=dict)  # positions that have come, from any partition
    fresh: dict[Step, list[Gathered]] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)  # of what is fresh


class Worker:
    """One of a group.

    Args:
        broker, topic, group: what is read.
        partials: where sums are written.
        keep: bytes, sums and blobs.
        watch: is told what was merged, refused or gone: an event's name and a receipt.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        topic: str,
        group: str,
        partials: Partials,
        keep: Keep,
        watch: Callable[[str, Receipt], None] = lambda event, receipt: None,
    ) -> None:
        self._partials, self._keep, self._watch = partials, keep, watch
        self._mine: dict[int, _Partition] = {}
        self._reader = broker.consume(topic, group, Shares(self._gained, self._lost))

    def step(self, timeout_s: float) -> int:
        """Read and merge what has come; how many records."""
        records = self._reader.poll(timeout_s)
        for record in records:
            mine = self._mine.get(record.partition)
            if mine is None or record.offset < mine.next:  # let go of meanwhile, or delivered twice
                continue
            self._merge(mine, record)
            mine.next = record.offset + 1
        return len(records)

    def flush(self) -> None:
        """Write what was merged. A partition that has another worker is dropped; one with a clash is read again."""
        for partition, mine in list(self._mine.items()):
            if mine.next == mine.owned.offset:
                continue
            try:
                self._write(mine)
            except StaleEpoch:
                del self._mine[partition]
            except CountedTwice:
                self._mine[partition] = begun = self._begun(partition)
                self._reader.back(partition, begun.next)

    def close(self) -> None:
        """Write, and give the partitions to the others."""
        self.flush()
        self._reader.close()

    def _merge(self, mine: _Partition, record: Record) -> None:
        try:
            receipt = Receipt.read(record.value)
        except MalformedMessage:  # nobody's update: there is nobody to tell
            return
        summing = self._sum(mine, receipt.step)
        if summing is None or receipt.position in mine.known[receipt.step]:
            return
        content = self._keep.fetch(receipt)
        if content is None:
            self._watch("gone", receipt)
            return
        refused = ""
        try:
            summing.take(receipt, content)
        except (UpdateRefused, ProtocolError) as error:
            refused = str(error)[:1000] or "refused"
        self._watch("refused" if refused else "merged", receipt)
        found = Gathered(receipt.position, receipt.key, refused, receipt.version, receipt.scale)
        mine.known[receipt.step].add(receipt.position)
        mine.fresh.setdefault(receipt.step, []).append(found)
        mine.receipts.append(receipt)

    def _sum(self, mine: _Partition, step: Step) -> Summing | None:
        if step not in mine.sums:
            for old in [s for s in mine.sums if s[0] == step[0] and s < step and s not in mine.fresh]:
                del mine.sums[old], mine.known[old]  # over: a later one has begun
            digest = self._partials.sum(step, mine.owned.partition)
            content = self._keep.get(digest) if digest else None
            mine.sums[step] = self._keep.sum(step, mine.owned.partition, content)
            mine.known[step] = {each.position for each in self._partials.gathered(step)}
        return mine.sums[step]

    def _write(self, mine: _Partition) -> None:
        merged = {step for step, found in mine.fresh.items() if any(not each.refused for each in found)}
        sums = {step: self._keep.put(s.content()) for step, s in mine.sums.items() if step in merged and s is not None}
        try:
            old = self._partials.write(mine.owned, mine.next, sums=sums, gathered=mine.fresh)
        except (StaleEpoch, CountedTwice):
            for digest in sums.values():
                self._keep.remove(digest)
            raise
        for digest in old:
            self._keep.remove(digest)
        for receipt in mine.receipts:
            self._keep.release(receipt)
        mine.owned, mine.fresh, mine.receipts = mine.owned._replace(offset=mine.next), {}, []

    def _gained(self, partition: int) -> int:
        self._mine[partition] = self._begun(partition)
        return self._mine[partition].next

    def _begun(self, partition: int) -> _Partition:
        owned = self._partials.own(partition)
        return _Partition(owned, owned.offset)

    def _lost(self, partition: int) -> None:
        """Another worker has it now, or will have; what is not written is read again there."""
        self._mine.pop(partition, None)

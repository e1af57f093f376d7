"""What every broker must do: in memory, and Kafka against librdkafka's mock cluster; against a real one if FOEDUS_KAFKA
names it (host:port)."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from foedus.errors import ConfigurationError, StorageError
from foedus.net.brokers.broker import LARGEST, Broker, Record, Shares
from foedus.net.brokers.kafka import KafkaBroker
from foedus.net.brokers.memory import MemoryBroker


class Place(NamedTuple):
    """Brokers that see the same records, and a topic nobody else uses."""

    broker: Callable[[], Broker]
    topic: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """librdkafka's mock cluster, in this process, reached over TCP like any other."""
    from confluent_kafka import Producer

    owner = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 2, "log_level": 0})
    brokers = owner.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{b.host}:{b.port}" for b in brokers)
    del owner


KINDS = ["memory", pytest.param("mock", marks=pytest.mark.slow), pytest.param("real", marks=pytest.mark.slow)]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    topic = f"foedus-test-{uuid.uuid4().hex[:12]}"
    opened: list[Broker] = []
    if request.param == "memory":
        one = MemoryBroker(partitions=4)
        yield Place(lambda: one, topic)
        return
    if request.param == "real" and "FOEDUS_KAFKA" not in os.environ:
        pytest.skip("FOEDUS_KAFKA names no broker (host:port)")
    servers = os.environ["FOEDUS_KAFKA"] if request.param == "real" else request.getfixturevalue("cluster")

    def broker() -> Broker:
        opened.append(KafkaBroker(f"kafka://{servers}", settings={"session.timeout.ms": 6000}))
        return opened[-1]

    yield Place(broker, topic)
    for each in opened:
        each.close()


class Reading:
    """A worker that keeps what it reads."""

    def __init__(self, broker: Broker, place: Place, begin: dict[int, int] | None = None, group: str = "g") -> None:
        self.records: list[Record] = []
        self.owns: set[int] = set()
        self.begin = begin or {}
        self.consumer = broker.consume(place.topic, f"{group}-{place.topic}", Shares(self._gained, self._lost))

    def _gained(self, partition: int) -> int:
        self.owns.add(partition)
        return self.begin.get(partition, 0)

    def _lost(self, partition: int) -> None:
        self.owns.discard(partition)

    def until(self, enough: Callable[[], bool], *others: Reading) -> None:
        for _ in range(300):
            for each in (self, *others):
                each.records += each.consumer.poll(0.1)
            if enough():
                return
        raise AssertionError(f"not in time: {len(self.records)} records, {self.owns}")


def published(place: Place, count: int, keys: int = 5) -> Broker:
    broker = place.broker()
    for number in range(count):
        broker.publish(place.topic, f"key {number % keys}".encode(), str(number).encode())
    return broker


def test_every_group_reads_all_in_order_within_a_key(place: Place) -> None:
    broker = published(place, 40)
    for group in ("a", "b"):
        reading = Reading(broker, place, group=group)
        reading.until(lambda: len(reading.records) >= 40)  # noqa: B023
        reading.consumer.close()
        by_key: dict[bytes, list[int]] = {}
        for record in reading.records:
            by_key.setdefault(record.key, []).append(int(record.value))
        assert by_key == {f"key {k}".encode(): list(range(k, 40, 5)) for k in range(5)}
        homes = {key: {r.partition for r in reading.records if r.key == key} for key in by_key}
        assert all(len(home) == 1 for home in homes.values())
        for partition in {r.partition for r in reading.records}:
            offsets = [r.offset for r in reading.records if r.partition == partition]
            assert offsets == sorted(set(offsets))


def test_a_partition_begins_where_its_worker_says_and_can_be_read_again(place: Place) -> None:
    """The broker remembers nothing: a worker that closes and comes back begins at its own offset."""
    broker = published(place, 30, keys=1)
    first = Reading(broker, place)
    first.until(lambda: len(first.records) >= 30)
    home = first.records[0].partition
    first.consumer.close()
    again = Reading(broker, place, {home: first.records[20].offset})
    again.until(lambda: len(again.records) >= 10)
    assert [int(r.value) for r in again.records] == list(range(20, 30))
    again.records.clear()
    again.consumer.back(home, first.records[25].offset)
    again.until(lambda: len(again.records) >= 5)
    assert [int(r.value) for r in again.records] == list(range(25, 30))
    again.consumer.close()


def test_partitions_are_shared_and_go_to_whoever_is_left(place: Place) -> None:
    broker = published(place, 1, keys=1)
    first, second = Reading(broker, place), Reading(broker, place)
    everything: set[int] = set()
    first.until(lambda: bool(first.owns | second.owns), second)

    def shared() -> bool:
        everything.update(first.owns | second.owns)
        return bool(first.owns and second.owns) and len(everything) == 4

    if place.topic and isinstance(broker, MemoryBroker):
        first.until(shared, second)
        assert first.owns & second.owns == set()
    before = first.owns | second.owns
    second.consumer.close()
    first.until(lambda: first.owns >= before)
    broker.publish(place.topic, b"key", b"after")
    first.until(lambda: any(r.value == b"after" for r in first.records))
    first.consumer.close()


def test_many_publish_at_once(place: Place) -> None:
    broker = place.broker()
    threads = [
        threading.Thread(target=broker.publish, args=(place.topic, bytes([n % 7]), bytes([n]))) for n in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    reading = Reading(broker, place)
    reading.until(lambda: len(reading.records) >= 40)
    assert sorted(r.value[0] for r in reading.records) == list(range(40))
    reading.consumer.close()


def test_large_records_are_refused(place: Place) -> None:
    broker = place.broker()
    with pytest.raises(ConfigurationError, match=f"at most {LARGEST} bytes"):
        broker.publish(place.topic, b"", bytes(LARGEST + 1))


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"message.timeout.ms": 300, "log_level": 0, "socket.timeout.ms": 300}
    broker = KafkaBroker("kafka://127.0.0.1:1", settings=settings)
    with pytest.raises(StorageError, match="the client keeps its bytes"):
        broker.publish("t", b"", b"")
    with pytest.raises(ConfigurationError, match=r"no Kafka answers at 127\.0\.0\.1:1: "):
        broker.check(seconds=0.3)
    broker.close()
    with pytest.raises(ConfigurationError, match="write kafka://host:9092"):
        KafkaBroker("localhost:9092")

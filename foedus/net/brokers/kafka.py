"""Kafka as the broker, by confluent-kafka (librdkafka).

Publishing waits for all replicas in step, with an idempotent producer, so that a receipt that was acknowledged is
there. Reading never commits offsets to Kafka: where a partition goes on is in the database, beside the sum that its
records are in, and is sought when the partition is assigned.

Address: ``kafka://host:9092,host:9092``. Topics are made by whoever runs the cluster (docs/howto/kafka.md); a cluster
that makes them by itself will do for a trial.

Not here: passwords; what librdkafka needs to know beyond the address is given as ``settings``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from typing import Any

from foedus.errors import ConfigurationError, MissingExtra, StorageError
from foedus.net.brokers.broker import LARGEST, Record, Shares
from foedus.net.troubles import Troubles

__all__ = ["KafkaBroker"]

_AT_ONCE = 500
_ACKNOWLEDGED_S = 10.0


class KafkaBroker:
    """A cluster.

    Example:
        >>> broker = KafkaBroker("kafka://10.0.0.5:9092")  # doctest: +SKIP
        >>> broker.publish("foedus-receipts", b"client 1", receipt.packed())  # doctest: +SKIP

    Args:
        address: ``kafka://host:port``, several with commas between.
        settings: librdkafka's own, such as ``{"security.protocol": "SSL"}``.
    """

    def __init__(self, address: str, *, settings: Mapping[str, str | int] | None = None) -> None:
        servers = address.removeprefix("kafka://")
        if not address.startswith("kafka://") or not servers:
            raise ConfigurationError(f"{address!r} is not the address of a Kafka cluster; write kafka://host:9092")
        self._library = _library()
        self._settings = {"bootstrap.servers": servers, "client.id": "foedus", **(settings or {})}
        self._logger = _logger()
        self._producer = self._library.Producer(
            {"enable.idempotence": True, "acks": "all", "linger.ms": 2, "message.timeout.ms": 9000, **self._settings},
            logger=self._logger,
        )
        self._closing = threading.Event()
        self._polling = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._polling.start()

    def check(self, *, seconds: float = 5.0) -> None:
        """Whether the cluster answers within some seconds; before anybody is told that there is a server.

        Raises:
            ConfigurationError: it does not.
        """
        try:
            self._producer.list_topics(timeout=seconds)
        except self._library.KafkaException as error:
            raise ConfigurationError(
                f"no Kafka answers at {self._settings['bootstrap.servers']}: {error.args[0].str()}. Is the address "
                "right, does it run, and may this machine reach it?"
            ) from error

    def publish(self, topic: str, key: bytes, value: bytes) -> None:
        """Return once all replicas in step have it."""
        if len(value) > LARGEST:
            raise ConfigurationError(f"a record has at most {LARGEST} bytes, not {len(value)}; bytes go elsewhere")
        done: Future[None] = Future()
        try:
            self._producer.produce(topic, value, key, on_delivery=_settled(done))
            done.result(_ACKNOWLEDGED_S)
        except (self._library.KafkaException, BufferError, TookTooLong) as error:
            raise StorageError(
                f"Kafka ({self._settings['bootstrap.servers']}) did not take a receipt for {topic!r}: "
                f"{error or 'no answer'}. Nothing is lost: the client keeps its bytes and sends them again"
            ) from error

    def consume(self, topic: str, group: str, shares: Shares) -> _Reader:
        """Read a topic as one of a group."""
        consumer = self._library.Consumer(
            {
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "cooperative-sticky",
                **self._settings,
                "group.id": group,
            },
            logger=self._logger,
        )
        return _Reader(consumer, topic, shares)

    def close(self) -> None:
        """Send what is on its way, then give up connections."""
        self._closing.set()
        self._polling.join()
        self._producer.flush(_ACKNOWLEDGED_S)

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(0.1)


class _Reader:
    """One worker's reading; used in one thread."""

    def __init__(self, consumer: Any, topic: str, shares: Shares) -> None:
        self._consumer, self._topic, self._shares = consumer, topic, shares
        self._fault: BaseException | None = None
        consumer.subscribe([topic], on_assign=self._gained, on_revoke=self._lost, on_lost=self._lost)

    def poll(self, timeout_s: float) -> Sequence[Record]:
        """The next records."""
        messages = self._consumer.consume(_AT_ONCE, timeout_s)
        if self._fault is not None:  # raised in a callback, where librdkafka would swallow it
            fault, self._fault = self._fault, None
            raise fault
        found = []
        for message in messages:
            if message.error() is None:
                found.append(
                    Record(message.partition(), message.offset(), message.key() or b"", message.value() or b"")
                )
            elif message.error().fatal():
                raise StorageError(f"Kafka gave up on {self._topic!r}: {message.error().str()}. Restart this worker")
        return found

    def back(self, partition: int, offset: int) -> None:
        """Read again from an offset."""
        self._consumer.seek(_library().TopicPartition(self._topic, partition, offset))

    def close(self) -> None:
        """Give the partitions to the others."""
        self._consumer.close()

    def _gained(self, consumer: Any, partitions: Sequence[Any]) -> None:
        try:
            for each in partitions:
                each.offset = self._shares.gained(each.partition)
            consumer.incremental_assign(list(partitions))
        except BaseException as error:
            self._fault = error

    def _lost(self, _: Any, partitions: Sequence[Any]) -> None:
        for each in partitions:
            try:
                self._shares.lost(each.partition)
            except BaseException as error:
                self._fault = error


def _settled(done: Future[None]) -> Callable[[Any, Any], None]:
    def settle(error: Any, _: Any) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(_library().KafkaException(error))

    return settle


class _Lines(logging.Handler):
    """librdkafka's own lines, in our log: it writes one at every attempt to connect, many a second."""

    def __init__(self) -> None:
        super().__init__()
        self._troubles = Troubles(time.time)

    def emit(self, record: logging.LogRecord) -> None:
        """Those that matter; the same once."""
        if record.levelno >= logging.WARNING:
            self._troubles.failed("kafka failed", record.getMessage())


def _logger() -> logging.Logger:
    found = logging.Logger("librdkafka")  # of this broker, and of no tree of loggers
    found.addHandler(_Lines())
    return found


def _library() -> Any:
    try:
        import confluent_kafka
    except ModuleNotFoundError as error:
        raise MissingExtra("confluent-kafka", "kafka", "A Kafka broker") from error
    return confluent_kafka

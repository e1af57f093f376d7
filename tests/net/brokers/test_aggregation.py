"""Effectively once: workers die between any two steps, records come twice, partitions move, and every sum is right."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import CountedTwice, MalformedMessage, Reason, StaleEpoch, UpdateRefused
from foedus.net.brokers.aggregation import Worker
from foedus.net.brokers.memory import MemoryBroker
from foedus.net.brokers.partials import Gathered, Partials
from foedus.net.brokers.receipts import Receipt
from foedus.net.store import open_store

sys.path.insert(0, str(Path(__file__).parents[1]))
import databases

STEP = ("heart", 1, 1)
Databases: dict[str, Callable[[Path], str]] = {
    "sqlite": lambda folder: f"sqlite:///{folder}/db.sqlite",
    "postgres": lambda folder: databases.postgres_url(),
}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def partials(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Partials]:
    store = open_store(Databases[request.param](tmp_path))
    yield Partials(store.engine, "receipts")
    store.close()


def receipt(position: int, *, round: int = 1, uri: str = "memory:a/1") -> Receipt:
    return Receipt("heart", round, 0, 1, position, bytes([position]) * 16, round, 1.0, uri, 1, b"d" * 32)


class Sum:
    """Adds positions up; refuses the thirteenth."""

    def __init__(self, total: int) -> None:
        self.total = total

    def take(self, receipt: Receipt, content: bytes) -> None:
        if receipt.position == 13:
            raise UpdateRefused("unlucky", reason=Reason.RANGE)
        self.total += content[0]

    def content(self) -> bytes:
        return secrets.token_bytes(8) + str(self.total).encode()  # never the same bytes twice, as when encrypted


class Keeping:
    """Blobs in memory; the bytes of client n are n."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.gone: set[int] = set()
        self.released: list[int] = []

    def fetch(self, receipt: Receipt) -> bytes | None:
        return None if receipt.position in self.gone else bytes([receipt.position])

    def release(self, receipt: Receipt) -> None:
        self.released.append(receipt.position)

    def sum(self, step: tuple[str, int, int], partition: int, content: bytes | None) -> Sum | None:
        return None if step[1] == 99 else Sum(int(content[8:]) if content else 0)

    def put(self, content: bytes) -> str:
        digest = content[:8].hex()
        self.blobs[digest] = content
        return digest

    def get(self, digest: str) -> bytes:
        return self.blobs[digest]

    def remove(self, digest: str) -> None:
        del self.blobs[digest]


def total(partials: Partials, keeping: Keeping) -> int:
    sums, _ = partials.whole(STEP)
    return sum(int(keeping.get(each.sum)[8:]) for each in sums)


def worker(broker: MemoryBroker, partials: Partials, keeping: Keeping) -> Worker:
    return Worker(broker, topic="receipts", group="workers", partials=partials, keep=keeping)


def test_what_is_published_is_summed_once(partials: Partials) -> None:
    broker, keeping = MemoryBroker(partitions=3), Keeping()
    for position in (1, 2, 3, 13, 2, 1):
        broker.publish("receipts", bytes([position]), receipt(position).packed())
    broker.publish("receipts", b"", b"nonsense")
    broker.publish("receipts", b"\x05", receipt(5, round=99).packed())  # of a step that is over
    one = worker(broker, partials, keeping)
    assert one.step(0.0) == 8
    one.flush()
    assert total(partials, keeping) == 6
    found = {each.position: each.refused for each in partials.gathered(STEP)}
    assert found == {1: "", 2: "", 3: "", 13: "unlucky"}
    assert sorted(keeping.released) == [1, 2, 3, 13]
    one.close()
    assert partials.forget_before(STEP) == []
    assert partials.forget_before(("heart", 1, 2))
    assert partials.whole(STEP) == ([], [])


def test_a_worker_that_lost_its_partition_writes_nothing(partials: Partials) -> None:
    broker, keeping = MemoryBroker(partitions=1), Keeping()
    broker.publish("receipts", b"", receipt(4).packed())
    slow = worker(broker, partials, keeping)
    slow.step(0.0)
    other = partials.own(0)  # another has it by now
    with pytest.raises(StaleEpoch, match="has another worker by now"):
        partials.write(other._replace(epoch=other.epoch - 1), 1, sums={}, gathered={})
    slow.flush()
    assert partials.whole(STEP) == ([], [])
    assert keeping.blobs == {}
    assert partials.own(0).offset == 0  # so that it is read again


def test_a_client_that_comes_by_two_partitions_counts_once(partials: Partials) -> None:
    """The number of partitions was changed under way: the database's key is the last word."""
    keeping = Keeping()
    a, b = MemoryBroker(partitions=1), MemoryBroker(partitions=2)
    for broker in (a, b):
        for position in (6, 7):
            broker.publish("receipts", b"\x01", receipt(position).packed())
    first, second = worker(a, partials, keeping), worker(b, partials, keeping)
    own, others = partials.own(0), [Gathered(6, b"k" * 16), Gathered(7, b"k" * 16)]
    partials.write(own, 0, sums={}, gathered={STEP: others[:1]})
    with pytest.raises(CountedTwice):
        partials.write(own, 0, sums={}, gathered={STEP: others})
    assert [g.position for g in partials.gathered(STEP)] == [6]
    first.close()
    second.close()


def test_a_clash_is_found_and_read_again(partials: Partials) -> None:
    broker, keeping = MemoryBroker(partitions=2), Keeping()
    for position in (6, 7):
        broker.publish("receipts", b"\x01", receipt(position).packed())
    one = worker(broker, partials, keeping)
    one.step(0.0)
    elsewhere = partials.own(9)
    partials.write(elsewhere, 1, sums={}, gathered={STEP: [Gathered(6, b"k" * 16)]})
    one.flush()  # fails, and goes back
    one.step(0.0)
    one.flush()
    assert total(partials, keeping) == 7
    assert [g.position for g in partials.gathered(STEP)] == [6, 7]
    one.close()


def test_bytes_that_are_gone_are_no_error(partials: Partials) -> None:
    broker, keeping = MemoryBroker(partitions=1), Keeping()
    keeping.gone = {2}
    for position in (1, 2, 3):
        broker.publish("receipts", b"", receipt(position).packed())
    one = worker(broker, partials, keeping)
    one.step(0.0)
    one.flush()
    keeping.gone.clear()
    broker.publish("receipts", b"", receipt(2, uri="memory:b/9").packed())  # the client was asked again
    one.step(0.0)
    one.close()
    assert total(partials, keeping) == 6


Acts = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 12)),
        st.tuples(st.sampled_from(["step", "flush", "crash", "join", "leave"]), st.integers(0, 2)),
    ),
    max_size=60,
)


@given(Acts)
def test_whatever_happens_every_client_counts_once(tmp_path_factory: pytest.TempPathFactory, acts: list) -> None:
    """Workers join, leave in order, and die between any two steps; clients send twice. In the end all is merged."""
    store = open_store("sqlite://")
    partials, keeping, broker = Partials(store.engine, "receipts"), Keeping(), MemoryBroker(partitions=3)
    workers: list[Worker] = [worker(broker, partials, keeping)]
    sent: set[int] = set()
    for act, number in acts:
        if act == "publish":
            broker.publish("receipts", bytes([number]), receipt(number).packed())
            sent.add(number)
            continue
        if act == "join":
            workers.append(worker(broker, partials, keeping))
            continue
        if not workers:
            continue
        one = workers[number % len(workers)]
        if act == "step":
            one.step(0.0)
        elif act == "flush":
            one.flush()
        else:
            workers.remove(one)
            if act == "leave":
                one.close()
            else:
                one._reader.close()  # nothing is written: it is dead
        counted = {g.position for g in partials.gathered(STEP)}
        assert total(partials, keeping) == sum(counted)  # at every moment
        assert counted <= sent
    for one in workers:
        one._reader.close()
    last = worker(broker, partials, keeping)
    while last.step(0.0):
        pass
    last.close()
    assert {g.position for g in partials.gathered(STEP)} == sent
    assert total(partials, keeping) == sum(sent)
    assert len(keeping.blobs) == len(partials.whole(STEP)[0])  # nothing is left over but by a crash
    store.close()


# --- receipts ---------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_are_a_receipt_or_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        Receipt.read(data)


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1}, {"position": 2**60}, {"key": b"short"}, {"digest": b""}, {"scale": 2.0}, {"scale": float("nan")},
        {"uri": "x" * 2000}, {"run": 3}, {"size": 1.0}, {"round": True},
    ],
)  # fmt: skip
def test_receipts_out_of_bounds_are_refused(change: dict) -> None:
    from dataclasses import replace

    with pytest.raises(MalformedMessage):
        Receipt.read(replace(receipt(1), **change).packed())


def test_a_receipt_is_small() -> None:
    from dataclasses import replace

    assert len(replace(receipt(1), run="r" * 128, uri="u" * 1000).packed()) < 1500
    with pytest.raises(MalformedMessage, match="at most 4096"):
        replace(receipt(1), uri="u" * 5000).packed()

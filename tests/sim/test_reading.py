"""Data is read once, in the cohort's order, ahead where it was begun; faults are told when their round comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.errors import DataError
from foedus.sim.reading import CHUNKS, Reading

PATIENCE = 20.0  # seconds that a thread may take to get its turn on a busy machine


def examples(client: int) -> tuple[Any, Any]:
    return np.full((2, 3), client, np.float32), np.full(2, client)


@contextmanager
def reading(function: Any, *, threads: int = 2) -> Iterator[tuple[Reading, fd.Clients]]:
    opened = Reading(threads=threads)
    try:
        yield opened, fd.Clients.generated(function, 1000)
    finally:
        opened.close()


def seen(found: list[fd.Examples]) -> list[int]:
    assert all((e.inputs[0] == e.targets[0]).all() for e in found)
    return [int(e.targets[0]) for e in found]


@pytest.mark.parametrize("size", [0, 1, 5, 2 * CHUNKS, 333])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_examples_come_in_the_order_of_the_cohort_and_each_is_read_once(size: int, ahead: bool) -> None:
    asked: Counter[int] = Counter()

    def counting(client: int) -> tuple[Any, Any]:
        asked[client] += 1
        return examples(client)

    cohort = np.random.default_rng(0).permutation(1000)[:size]
    with reading(counting) as (opened, clients):
        if ahead:
            opened.begin(cohort, clients)
        assert seen(opened.take(cohort, clients)) == cohort.tolist()
    assert asked == Counter(cohort.tolist())


def test_what_was_begun_is_read_without_being_waited_for() -> None:
    done = Event()

    def telling(client: int) -> tuple[Any, Any]:
        done.set()
        return examples(client)

    with reading(telling) as (opened, clients):
        opened.begin(np.array([7]), clients)
        assert done.wait(PATIENCE)


def test_another_cohort_than_was_begun_is_read_all_the_same() -> None:
    with reading(examples) as (opened, clients):
        opened.begin(np.array([1, 2, 3]), clients)
        assert seen(opened.take(np.array([4, 5]), clients)) == [4, 5]
        assert seen(opened.take(np.array([1, 2, 3]), clients)) == [1, 2, 3]


def test_nobody_reads_on_when_the_rest_is_not_wanted() -> None:
    begun, closing, asked = Event(), Event(), []

    def slow(client: int) -> tuple[Any, Any]:
        asked.append(client)
        begun.set()
        assert closing.wait(PATIENCE)
        return examples(client)

    with reading(slow, threads=1) as (opened, clients):
        opened.begin(np.arange(500), clients)
        assert begun.wait(PATIENCE)
        opened.begin(np.array([999]), clients)  # takes the place of the other 499
        closing.set()
        assert seen(opened.take(np.array([999]), clients)) == [999]
    assert asked == [0, 999]


def test_a_fault_in_what_was_read_ahead_is_told_when_it_is_taken() -> None:
    def broken(client: int) -> tuple[Any, Any]:
        if client == 13:
            raise OSError("the file is gone")
        return examples(client)

    with reading(broken) as (opened, clients):
        opened.begin(np.array([12, 13]), clients)
        with pytest.raises(DataError, match=r"data of client 13 could not be read.*the file is gone"):
            opened.take(np.array([12, 13]), clients)
        assert seen(opened.take(np.array([12]), clients)) == [12]

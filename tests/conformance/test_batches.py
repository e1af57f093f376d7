"""Plans: every example exactly once an epoch, whoever else is in the cohort."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from scipy import stats

import foedus.core.batches
from foedus.core.batches import Plan, alike, plan, processed
from foedus.core.client import LocalSGD, local_sgd
from foedus.errors import ConfigurationError

sizes_ = st.lists(st.integers(1, 23), min_size=1, max_size=6)
batches = st.one_of(st.none(), st.integers(1, 9))
seeds = st.integers(0, 2**40)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = np.array(draw(sizes_), np.int64)
    clients = draw(st.lists(st.integers(0, 10**6), min_size=len(sizes), max_size=len(sizes), unique=True))
    return sizes, np.array(clients, np.int64)


def batches_of(made: Plan, slot: int) -> list[list[int]]:
    mine = made.client == slot
    return [rows[:n].tolist() for rows, n in zip(made.rows[mine], made.count[mine], strict=True)]


@given(cohorts(), batches, st.integers(1, 3), seeds)
def test_every_example_comes_exactly_once_an_epoch(cohort: tuple, batch: int | None, epochs: int, seed: int) -> None:
    sizes, clients = cohort
    made = plan(local_sgd(0.1, epochs=epochs, batch_size=batch), sizes, clients, seed=seed, round=2)
    for slot, size in enumerate(sizes.tolist()):
        own, width = batches_of(made, slot), batch or size
        per_epoch = -(-size // width)
        assert len(own) == epochs * per_epoch == made.steps[slot]
        for epoch in range(epochs):
            part = own[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(row for rows in part for row in rows) == list(range(size))
            assert [len(rows) for rows in part[:-1]] == [width] * (per_epoch - 1)
            assert len(part[-1]) == size - (per_epoch - 1) * width


@given(cohorts(), batches, st.integers(1, 12), seeds)
def test_a_number_of_steps_cuts_the_epochs_short(cohort: tuple, batch: int | None, steps: int, seed: int) -> None:
    sizes, clients = cohort
    made = plan(local_sgd(0.1, steps=steps, batch_size=batch), sizes, clients, seed=seed, round=1)
    many = plan(local_sgd(0.1, epochs=steps, batch_size=batch), sizes, clients, seed=seed, round=1)
    for slot in range(len(sizes)):
        assert batches_of(made, slot) == batches_of(many, slot)[:steps]
        assert made.steps[slot] == steps


@given(cohorts(), batches, st.integers(1, 3), seeds, st.integers(1, 4))
def test_a_limit_gives_the_first_steps(cohort: tuple, batch: int | None, epochs: int, seed: int, limit: int) -> None:
    sizes, clients = cohort
    spec = local_sgd(0.1, epochs=epochs, batch_size=batch)
    whole = plan(spec, sizes, clients, seed=seed, round=1)
    short = plan(spec, sizes, clients, seed=seed, round=1, limit=limit)
    for slot in range(len(sizes)):
        assert batches_of(short, slot) == batches_of(whole, slot)[:limit]


@given(cohorts(), batches, st.integers(1, 3), seeds)
def test_a_clients_batches_do_not_depend_on_the_others(
    cohort: tuple, batch: int | None, epochs: int, seed: int
) -> None:
    sizes, clients = cohort
    spec = local_sgd(0.1, epochs=epochs, batch_size=batch)
    together = plan(spec, sizes, clients, seed=seed, round=5)
    for slot in range(len(sizes)):
        alone = plan(spec, sizes[slot : slot + 1], clients[slot : slot + 1], seed=seed, round=5)
        assert batches_of(alone, 0) == batches_of(together, slot)
        assert alone.keys.tolist() == together.keys[together.client == slot].tolist()


@given(cohorts(), batches, st.integers(1, 3), seeds, st.randoms())
def test_a_part_of_a_plan_is_the_plan_of_the_part(
    cohort: tuple, batch: int | None, epochs: int, seed: int, shuffler: object
) -> None:
    sizes, clients = cohort
    spec = local_sgd(0.1, epochs=epochs, batch_size=batch)
    whole = plan(spec, sizes, clients, seed=seed, round=1)
    slots = np.random.default_rng(seed).permutation(len(sizes))[: max(1, len(sizes) // 2)]
    part, wanted = whole.of(slots), plan(spec, sizes[slots], clients[slots], seed=seed, round=1)
    for field in ("count", "client", "first", "last", "keys", "steps"):
        np.testing.assert_array_equal(getattr(part, field), getattr(wanted, field))
    for slot in range(len(slots)):
        assert batches_of(part, slot) == batches_of(wanted, slot)


@given(cohorts(), batches, st.integers(1, 3), seeds)
def test_the_fields_agree_with_one_another(cohort: tuple, batch: int | None, epochs: int, seed: int) -> None:
    sizes, clients = cohort
    made = plan(local_sgd(0.1, epochs=epochs, batch_size=batch), sizes, clients, seed=seed, round=1)
    assert made.client.tolist() == np.repeat(np.arange(len(sizes)), made.steps).tolist()
    ends = np.cumsum(made.steps)
    assert np.flatnonzero(made.last).tolist() == (ends - 1).tolist()
    assert np.flatnonzero(made.first).tolist() == (ends - made.steps).tolist()
    assert (made.count >= 1).all()
    assert (made.rows >= 0).all()
    assert (made.rows < sizes[made.client][:, None]).all(), "padding points at examples that exist"
    assert made.rows.dtype == made.count.dtype == made.client.dtype == made.steps.dtype == np.int32
    assert len({tuple(k) for k in made.keys.tolist()}) == len(made.keys), "every step has a key of its own"


@given(cohorts(), batches, st.one_of(st.none(), st.integers(1, 40)), st.integers(1, 3))
def test_what_is_processed_is_what_is_planned(cohort: tuple, batch: int | None, steps: int | None, epochs: int) -> None:
    sizes, clients = cohort
    amounts = {"steps": steps} if steps else {"epochs": epochs}
    spec = local_sgd(0.1, batch_size=batch, **amounts)
    made = plan(spec, sizes, clients, seed=0, round=1)
    with_empty = np.insert(sizes, 0, 0)
    wanted = np.bincount(made.client, weights=made.count, minlength=len(sizes))
    assert processed(spec, with_empty).tolist() == [0, *wanted.tolist()]


uneven = st.lists(st.integers(0, 9).map(lambda k: 3**k), min_size=1, max_size=30).map(np.array)


@given(uneven, st.one_of(st.none(), st.integers(1, 300)), st.integers(1, 3), st.sampled_from([1, 64, 10**9]))
def test_no_part_of_a_cohort_is_mostly_padding(sizes: Any, batch: int | None, epochs: int, room: int) -> None:
    spec = local_sgd(0.1, epochs=epochs, batch_size=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foedus.core.batches, "ROOM", room)
        parts = alike(spec, sizes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert len(parts) <= 2 + np.log2(sizes.max() / sizes.min())
    for part in parts:
        made = plan(spec, sizes[part], part, seed=0, round=1)
        assert made.rows.size <= max(room, 2 * made.count.sum() + 2 * epochs * len(part) * (batch or 0))


def test_a_giant_among_many_small_ones_is_planned_apart() -> None:
    sizes = np.array([7] * 2000 + [1_000_000])
    parts = alike(local_sgd(0.1, epochs=2, batch_size=None), sizes)
    assert [len(part) for part in parts] == [2, 1999]  # the giant and one more take as much again as the giant
    made = [plan(local_sgd(0.1, batch_size=None), sizes[part], part, seed=0, round=1) for part in parts]
    assert sum(m.rows.size for m in made) == 2 * 1_000_000 + 1999 * 7
    assert len(alike(local_sgd(0.1, batch_size=32), sizes)) == 1


def test_a_plan_that_no_memory_holds_is_refused() -> None:
    told = "1,000 batches of up to 4,000,000 examples, for 1 client together, take 15 GB. Give a smaller batch_size"
    with pytest.raises(ConfigurationError, match=told):
        plan(local_sgd(0.1, steps=1000, batch_size=None), np.array([4_000_000]), np.array([0]), seed=0, round=1)


def test_orders_differ_between_rounds_epochs_clients_and_seeds() -> None:
    def orders(spec: LocalSGD, client: int, *, seed: int, round: int) -> list[tuple[int, ...]]:
        made = plan(spec, np.array([30]), np.array([client]), seed=seed, round=round)
        return [tuple(row) for row in made.rows.tolist()]

    spec = local_sgd(0.1, epochs=2, batch_size=None)
    found = [o for c in (0, 1) for seed in (0, 1) for r in (1, 2) for o in orders(spec, c, seed=seed, round=r)]
    assert len(set(found)) == len(found) == 16


def test_all_orders_are_equally_likely() -> None:
    spec, trials = local_sgd(0.1, batch_size=None), 6000
    made = plan(spec, np.full(trials, 4), np.arange(trials), seed=0, round=1)
    counts = Counter(map(tuple, made.rows.tolist()))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.slow
def test_a_large_cohort_is_planned_fast_and_small() -> None:
    """100,000 clients of 20 examples: two million rows in well under a second, and nothing else of that size."""
    made = plan(local_sgd(0.1, batch_size=10), np.full(100_000, 20), np.arange(100_000), seed=0, round=1)
    assert made.rows.shape == (200_000, 10)
    assert (np.sort(made.rows.reshape(-1, 20), axis=1) == np.arange(20)).all()

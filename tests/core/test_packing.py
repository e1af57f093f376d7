"""Packing: every step once and in order, padding under its share, no call that need not be."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from foedus.core.batches import plan
from foedus.core.client import local_sgd
from foedus.core.packing import Call, blocks, calls

sizes_of = st.lists(st.integers(1, 70), min_size=1, max_size=30)


def computed(found: list[Call]) -> int:
    return sum(len(c.members) * c.width for c in found)


def counts(sizes: list[int], *, epochs: int = 2, batch: int | None = 10) -> tuple[NDArray, NDArray]:
    own = plan(
        local_sgd(lr=0.1, epochs=epochs, batch_size=batch),
        np.array(sizes),
        np.arange(len(sizes)),
        seed=0,
        round=1,
    )
    return own.count, own.steps


@given(sizes=sizes_of, batch=st.sampled_from([1, 4, 10, 32, None]), share=st.sampled_from([0.0, 0.1, 0.5]))
def test_every_step_is_taken_once_in_its_clients_order(sizes: list[int], batch: int | None, share: float) -> None:
    count, steps = counts(sizes, batch=batch)
    taken: list[list[int]] = [[] for _ in sizes]
    for call in calls(count, steps, padding=share):
        assert np.all(np.diff(call.members) > 0)
        assert np.all(count[call.steps] <= call.width)
        for member, step in zip(call.members.tolist(), call.steps.tolist(), strict=True):
            taken[member].append(step)
    begin = np.cumsum(steps) - steps
    assert taken == [list(range(b, b + s)) for b, s in zip(begin.tolist(), steps.tolist(), strict=True)]


@given(sizes=sizes_of, batch=st.sampled_from([4, 10, 32, None]))
def test_padding_costs_under_a_tenth(sizes: list[int], batch: int | None) -> None:
    count, steps = counts(sizes, batch=batch)
    done = computed(calls(count, steps))
    assert done - count.sum() <= 0.1 * done


@given(sizes=sizes_of, batch=st.sampled_from([4, 10, 32, None]))
def test_without_padding_only_equal_batches_go_together(sizes: list[int], batch: int | None) -> None:
    count, steps = counts(sizes, batch=batch)
    assert all(np.all(count[c.steps] == c.width) for c in calls(count, steps, padding=0.0))


@given(size=st.integers(1, 70), clients=st.integers(1, 20), share=st.sampled_from([0.0, 0.1]))
def test_clients_of_one_size_never_wait(size: int, clients: int, share: float) -> None:
    count, steps = counts([size] * clients)
    found = calls(count, steps, padding=share)
    assert len(found) == steps[0]
    assert computed(found) == count.sum()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), clients=st.integers(30, 120))
def test_ragged_clients_do_not_fall_apart_into_single_steps(seed: int, clients: int) -> None:
    """At least half of what a schedule without any bound on padding would pack into a call."""
    sizes = np.maximum(1, np.random.default_rng(seed).lognormal(3.5, 0.8, clients)).astype(int)
    count, steps = counts(sizes.tolist())
    assert len(calls(count, steps)) <= 2 * steps.max() + 20


@given(sizes=st.lists(st.integers(0, 100), max_size=40), count=st.integers(1, 9), most=st.integers(1, 12))
def test_blocks_hold_every_client_once_sorted_by_size(sizes: list[int], count: int, most: int) -> None:
    cut = blocks(np.array(sizes, np.int64), count, most=most)
    together = [slot for block in cut for slot in block.tolist()]
    assert sorted(together) == list(range(len(sizes)))
    assert [sizes[slot] for slot in together] == sorted(sizes, reverse=True)
    assert all(0 < len(b) <= most for b in cut)
    assert len(cut) <= count + len(sizes) // most + 1


@given(size=st.integers(1, 100), clients=st.integers(1, 60), count=st.integers(1, 9))
def test_clients_of_one_size_are_cut_evenly(size: int, clients: int, count: int) -> None:
    lengths = [len(b) for b in blocks(np.full(clients, size), count, most=100)]
    assert len(lengths) == min(count, clients)
    assert max(lengths) - min(lengths) <= 1


@given(sizes=st.lists(st.integers(1, 50), min_size=20, max_size=60), count=st.integers(1, 5))
def test_blocks_have_about_equal_work(sizes: list[int], count: int) -> None:
    work = [sum(sizes[i] for i in b.tolist()) for b in blocks(np.array(sizes), count, most=100)]
    assert max(work) <= sum(sizes) / count + max(sizes)

"""Clients: what a population is, however it is held."""

import cloudpickle
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.population import Clients, Examples, Rows
from foedus.errors import ConfigurationError, DataError

POOL = Examples.of(np.arange(20.0)[:, None], np.arange(20) % 3)
deals = st.lists(st.lists(st.integers(0, 19), max_size=8), min_size=1, max_size=6)


def values(examples):
    return examples.inputs[0].ravel().tolist()


def twin(clients):
    """The same population, but made by a function instead of lying in a pool."""
    return Clients.generated(lambda i: clients.train(clients.ids.index(i)), clients.ids)


def make(position):
    return [[float(position)]] * (position % 3), [0] * (position % 3)


# --- making -------------------------------------------------------------------------------------------------


@given(deals)
def test_a_pooled_client_has_its_rows(rows):
    clients = Clients.pooled(POOL, rows)
    assert [values(clients.train(i)) for i in range(len(clients))] == [[float(v) for v in r] for r in rows]
    assert clients.sizes.tolist() == [len(r) for r in rows]
    assert values(clients.pooled_examples()) == [float(v) for r in rows for v in r]
    pool, held = clients.pool
    assert pool is POOL
    assert [r.tolist() for r in held] == rows


def test_of_puts_clients_into_one_pool():
    clients = Clients.of({"a": ([[1.0], [2.0]], [0, 1]), "b": Examples.of([[3.0]], [1])})
    assert clients.ids == ("a", "b")
    assert values(clients.train(0)) == [1, 2]
    assert values(clients.train(1)) == [3]
    assert len(clients.pool[0]) == 3
    assert clients.test(0) is None
    assert clients.validation(0) is None


def test_of_takes_other_parts_and_leaves_the_unmentioned_empty():
    clients = Clients.of({"a": ([[1.0]], [0]), "b": ([[2.0]], [0])}, test={"b": ([[3.0]], [1])})
    assert len(clients.test(0)) == 0
    assert values(clients.test(1)) == [3]


def test_a_million_generated_clients_cost_nothing():
    asked = []

    def function(client):
        asked.append(client)
        return [[float(client)]], [0]

    clients = Clients.generated(function, range(1_000_000))
    assert asked == []
    assert values(clients.train(999_999)) == [999_999]
    assert clients.sizes is None
    assert clients.pool is None
    assert len(clients) == 1_000_000
    assert len(cloudpickle.dumps(clients)) < 5_000


def test_generated_clients_may_have_names_and_sizes():
    clients = Clients.generated(lambda name: ([[float(len(name))]], [0]), ["x", "yyy"], sizes=[1, 1])
    assert values(clients.train(1)) == [3]
    assert clients.sizes.tolist() == [1, 1]


def test_empty_and_one_sample_clients_are_allowed():
    clients = Clients.pooled(POOL, [[], [4]])
    assert len(clients.train(0)) == 0
    assert clients.train(0).inputs[0].shape == (0, 1)
    assert len(clients.train(1)) == 1


def test_numpy_ids_become_plain_ones():
    clients = Clients.pooled(POOL, [[0], [1]], ids=np.array(["a", "b"]))
    assert [type(i) for i in clients.ids] == [str, str]
    assert type(Clients.pooled(POOL, [[0]], ids=np.array([7])).ids[0]) is int


# --- refusing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Clients.pooled(POOL, [[0], [1], [2]], ids=["a", "b", "a"]), "'a' occur more than once"),
        (lambda: Clients.generated(make, [3, 4, 3, 4]), "3, 4 occur more than once"),
        (
            lambda: Clients.pooled(POOL, [[0], [20]], ids=["a", "b"]),
            "Client 'b' has row 20, and the pool has rows 0 to 19",
        ),
        (lambda: Clients.pooled(POOL, [[-1]]), "Client 0 has row -1"),
        (lambda: Clients.pooled(POOL, [[0], [1]], ids=["a"]), "1 client ids for the data of 2 clients"),
        (lambda: Clients.pooled(POOL, []), "at least one client"),
        (lambda: Clients.generated(make, 0), "at least one client"),
        (lambda: Clients.pooled(POOL, [np.zeros(20, bool)]), r"np\.flatnonzero\(mask\)"),
        (lambda: Clients.pooled(POOL, [[0.5]]), "float64"),
        (lambda: Clients.generated(make, [1.5]), "1.5 is of type float"),
        (lambda: Clients.generated(make, [True]), "True is of type bool"),
        (
            lambda: Clients.of({"a": ([[1.0]], [0]), "b": ([[1.0, 2.0]], [0])}),
            "client 'b' has .*client 'a' has",
        ),
        (lambda: Clients.of({"a": ([[1.0]], [0, 1])}), "In the data of client 'a': .*input: 1, targets: 2"),
        (
            lambda: Clients.of({"a": ([[1.0]], [0])}, test={"c": ([[1.0]], [0])}),
            "client 'c', who has no training",
        ),
        (lambda: Clients.of({"a": [1.0]}), "client 'a' must be Examples or a pair"),
        (lambda: Clients.generated(make, 2, sizes=[1, 2, 3]), "2 client ids for the data of 3"),
        (lambda: Clients.generated(lambda i: None, [7]).train(0), "function for client 7 must be .*NoneType"),
        (lambda: Clients.pooled(POOL, [[0]]).train(1), "no client at position 1"),
        (lambda: Clients.pooled(POOL, [[0]]).train(-1), "no client at position -1"),
        (
            lambda: Clients.pooled(POOL, [[0]]).map(lambda e: e.inputs),
            "must return Examples, and returned a tuple",
        ),
    ],
)
def test_bad_populations_are_refused(build, message):
    with pytest.raises(DataError, match=message):
        build()


# --- splitting ----------------------------------------------------------------------------------------------


@given(deals, st.integers(0, 50), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_split_is_disjoint_complete_and_the_same_for_a_function(rows, seed, validation, test):
    clients = Clients.pooled(POOL, rows)
    split = clients.split(validation=validation, test=test, seed=seed)
    again = twin(clients).split(validation=validation, test=test, seed=seed)
    for i, own in enumerate(rows):
        parts = [split.train(i), split.validation(i), split.test(i)]
        assert sorted(v for p in parts if p is not None for v in values(p)) == sorted(float(r) for r in own)
        for part, other in zip(parts, [again.train(i), again.validation(i), again.test(i)], strict=True):
            assert (part is None) == (other is None)
            assert part is None or values(part) == values(other)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (0, (0, 0, 0)),
        (1, (1, 0, 0)),
        (2, (2, 0, 0)),
        (3, (2, 0, 1)),
        (5, (3, 1, 1)),
        (10, (7, 1, 2)),
        (100, (70, 10, 20)),
    ],
)
def test_small_clients_follow_the_stated_rule(size, wanted):
    pool = Examples.of(np.arange(100.0)[:, None], np.zeros(100, int))
    split = Clients.pooled(pool, [range(size)]).split(validation=0.1, test=0.2)
    assert (len(split.train(0)), len(split.validation(0)), len(split.test(0))) == wanted


def test_training_keeps_one_whatever_the_shares():
    split = Clients.pooled(POOL, [[3], [1, 2]]).split(validation=0.49, test=0.5)
    assert split.sizes.tolist() == [1, 1]
    assert len(split.test(1)) == 1


def test_a_split_does_not_depend_on_the_other_clients():
    clients = Clients.pooled(POOL, [range(10), range(10, 20)], ids=["a", "b"])
    alone = clients.subset([1]).split(seed=4)
    assert values(alone.test(0)) == values(clients.split(seed=4).test(1))


def test_clients_and_seeds_split_differently():
    pool = Examples.of(np.arange(50.0)[:, None], np.zeros(50, int))
    clients = Clients.pooled(pool, [range(50), range(50)])
    first, second = clients.split(seed=0), clients.split(seed=1)
    assert values(first.test(0)) != values(first.test(1))
    assert values(first.test(0)) != values(second.test(0))


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (-0.1, 0.2), (0.0, 1.0), (float("nan"), 0.1)])
def test_impossible_shares_are_refused(validation, test):
    with pytest.raises(ConfigurationError, match="cannot be"):
        Clients.pooled(POOL, [[0]]).split(validation=validation, test=test)


def test_an_existing_test_part_is_not_thrown_away():
    clients = Clients.of({"a": ([[1.0]] * 10, [0] * 10)}, test={"a": ([[2.0]], [0])})
    with pytest.raises(ConfigurationError, match=r"test examples already. Write split\(test=0"):
        clients.split()
    kept = clients.split(validation=0.1, test=0)
    assert values(kept.test(0)) == [2]
    assert len(kept.validation(0)) == 1


# --- changing -----------------------------------------------------------------------------------------------


def centred(examples):
    """A function that depends on all examples it sees: pooling would show."""
    return Examples.of(examples.inputs[0] - examples.inputs[0].mean(), examples.targets)


@given(deals)
def test_map_sees_one_client_at_a_time(rows):
    clients = Clients.pooled(POOL, rows)
    mapped = clients.map(centred)
    assert mapped.pool is not None
    for i, own in enumerate(rows):
        wanted = np.array(own, np.float32) - np.float32(np.mean(own, dtype=np.float32) if own else 0)
        assert np.allclose(values(mapped.train(i)), wanted, atol=1e-5)
    if all(rows):
        assert all(values(twin(clients).map(centred).train(i)) == values(mapped.train(i)) for i in range(len(rows)))


def test_map_reaches_every_part_and_may_change_lengths():
    double = lambda e: Examples.concat([e, e])  # noqa: E731
    clients = Clients.pooled(POOL, [range(10), [1, 2], []]).split(test=0.2).with_test(POOL).map(double)
    assert clients.sizes.tolist() == [14, 4, 0]
    assert len(clients.test(0)) == 4
    assert len(clients.validation(0)) == 2
    assert len(clients.central_test) == 40


def test_empty_clients_are_not_shown_to_the_function():
    clients = Clients.pooled(POOL, [[], []]).map(centred)  # the mean of nothing would warn
    assert clients.sizes.tolist() == [0, 0]


def test_map_fitted_fits_to_training_examples_only():
    clients = Clients.of({"a": ([[1.0], [3.0]], [0, 0])}, test={"a": ([[10.0]], [0])}, central_test=([[5.0]], [0]))

    def fit(train):
        shift = train.inputs[0].mean()
        return lambda e: Examples.of(e.inputs[0] - shift, e.targets)

    for population in (
        clients,
        Clients.generated(lambda i: ([[1.0], [3.0]], [0, 0]), ["a"], test=lambda i: ([[10.0]], [0])),
    ):
        mapped = population.map_fitted(fit)
        assert values(mapped.train(0)) == [-1, 1]
        assert values(mapped.test(0)) == [8]
    assert values(clients.map_fitted(fit).central_test) == [0]


@given(deals, st.data())
def test_subset_keeps_ids_and_data(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    clients = Clients.pooled(POOL, rows, ids=[f"c{i}" for i in range(len(rows))])
    for population in (clients, twin(clients)):
        part = population.subset(chosen)
        assert list(part.ids) == [f"c{i}" for i in chosen]
        assert [values(part.train(k)) for k in range(len(chosen))] == [values(clients.train(i)) for i in chosen]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([2], "position 2"),
        ([-1], "position -1"),
        ([0, 0], "more than once"),
        ([], "at least one"),
        ([True, False], "flatnonzero"),
    ],
)
def test_bad_subsets_are_refused(positions, message):
    with pytest.raises(DataError, match=message):
        Clients.pooled(POOL, [[0], [1]]).subset(positions)


@given(deals)
def test_rows_are_a_sequence(rows):
    held = Rows.of(rows)
    assert len(held) == len(rows)
    assert [r.tolist() for r in held] == rows
    assert [r.tolist() for r in held[::-1]] == rows[::-1]


# --- travelling and being recognised ------------------------------------------------------------------------


def test_populations_travel_to_other_processes():
    clients = Clients.pooled(POOL, [range(10), range(10, 20)]).split(seed=1).map(centred)
    there = cloudpickle.loads(cloudpickle.dumps(clients))
    assert values(there.train(1)) == values(clients.train(1))
    assert there.fingerprint() == clients.fingerprint()
    lazy = cloudpickle.loads(cloudpickle.dumps(Clients.generated(make, 9).split().map(centred).subset([5])))
    assert len(lazy.train(0)) == 2


def test_a_resident_pool_is_not_copied_per_client():
    pool = Examples.of(np.zeros((1000, 100), np.float32), np.zeros(1000, int))
    clients = Clients.pooled(pool, np.array_split(np.arange(1000), 500)).split()
    assert len(cloudpickle.dumps(clients)) < 2 * pool.nbytes
    assert clients.pool[0] is pool


def test_fingerprints_tell_populations_apart():
    base = Clients.pooled(POOL, [[0, 1], [2]])
    others = [
        Clients.pooled(POOL, [[0], [1, 2]]),
        Clients.pooled(POOL, [[1, 0], [2]]),
        Clients.pooled(POOL, [[0, 1], [2]], ids=["a", "b"]),
        Clients.pooled(Examples.of(POOL.inputs[0] + 1, POOL.targets), [[0, 1], [2]]),
        Clients.pooled(Examples.of(POOL.inputs[0], POOL.targets[::-1].copy()), [[0, 1], [2]]),
        base.with_test(POOL),
        base.split(),
        base.subset([0]),
        Clients.generated(make, 2),
        Clients.generated(make, 3),
    ]
    prints = [clients.fingerprint() for clients in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    assert base.fingerprint() == Clients.pooled(POOL, [[0, 1], [2]]).fingerprint()


@pytest.mark.slow
def test_a_million_resident_clients_are_handled_in_bulk():
    count = 1_000_000
    pool = Examples.of(np.zeros((count * 2, 1), np.float32), np.zeros(count * 2, int))
    offsets = np.arange(0, 2 * count + 1, 2)
    clients = Clients.pooled(pool, Rows(np.arange(2 * count), offsets)).split(test=0.5, validation=0)
    assert clients.sizes.sum() == count
    assert len(clients.subset(np.arange(0, count, 2))) == count // 2

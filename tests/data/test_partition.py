"""Partitions: every row once where the rule permits, the same for a seed, and as each rule is written."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from foedus.core.random import generator
from foedus.data import by_class, by_key, dirichlet, from_arrays, iid, quantity_skew, shards
from foedus.errors import ConfigurationError, DataError

labels = st.lists(st.integers(0, 4), min_size=24, max_size=80).map(np.array)
complete = st.one_of(
    st.builds(iid, st.integers(1, 10)),
    st.builds(shards, st.integers(1, 8), shards_per_node=st.integers(1, 3)),
    st.builds(dirichlet, st.integers(1, 10), alpha=st.floats(0.02, 50), minimum=st.integers(0, 2)),
    st.builds(quantity_skew, st.integers(1, 10), alpha=st.floats(0.02, 50), minimum=st.integers(0, 2)),
)


def deal(rule, targets, seed=0, groups=None):
    return rule.deal(targets, groups or {}, generator(seed, "test"))


@given(complete, labels, st.integers(0, 9))
def test_every_row_is_used_exactly_once_and_the_seed_decides(rule, targets, seed):
    dealt = deal(rule, targets, seed)
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(len(targets)))
    again = deal(rule, targets, seed)
    assert all(np.array_equal(again[node], rows) for node, rows in dealt.items())


@given(st.integers(1, 12), labels)
def test_iid_sizes_differ_by_one_at_most(nodes, targets):
    sizes = [len(r) for r in deal(iid(nodes), targets).values()]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 6), st.integers(1, 4), labels)
def test_shards_are_runs_of_the_sorted_rows(nodes, per_node, targets):
    place = np.empty(len(targets), int)
    place[np.argsort(targets, kind="stable")] = np.arange(len(targets))
    for rows in deal(shards(nodes, shards_per_node=per_node), targets).values():
        breaks = int((np.diff(place[rows]) != 1).sum())
        assert breaks < per_node


def test_mcmahans_shards_give_most_nodes_two_classes():
    targets = np.repeat(np.arange(10), 600)
    seen = [len(np.unique(targets[r])) for r in deal(shards(100), targets).values()]
    assert max(seen) <= 2
    assert [len(r) for r in deal(shards(100), targets).values()] == [60] * 100


def test_small_alpha_is_more_skewed_than_large():
    targets = np.arange(5000) % 10

    def skew(alpha):
        counts = [np.bincount(targets[r], minlength=10) for r in deal(dirichlet(10, alpha=alpha), targets).values()]
        return np.mean([c.max() / c.sum() for c in counts])

    assert skew(0.1) > 0.35 > 0.2 > skew(100.0)


@given(st.integers(2, 8), st.integers(1, 5), st.sampled_from([dirichlet, quantity_skew]))
def test_the_minimum_holds(nodes, minimum, rule):
    targets = np.arange(nodes * minimum + 7) % 3
    sizes = [len(r) for r in deal(rule(nodes, alpha=0.01, minimum=minimum), targets).values()]
    assert min(sizes) >= minimum


class TestByClass:
    @given(st.integers(1, 12), st.floats(0.05, 1.0), labels)
    def test_the_rule_as_written(self, nodes, share, targets):
        assume(len(np.unique(targets)) > 1)
        assume(share * len(np.unique(targets)) >= 1)
        try:
            dealt = deal(by_class(nodes, share=share), targets)
        except DataError:
            return  # not one row per node: see below
        classes = np.unique(targets)
        counts = np.array([[(targets[r] == c).sum() for c in classes] for r in dealt.values()])
        size = counts.sum(axis=1)
        assert (size == size[0]).all()  # equal sizes
        rows = np.concatenate(list(dealt.values()))
        assert len(np.unique(rows)) == len(rows)  # no row twice
        for node in range(nodes):
            home = node % len(classes)
            assert counts[node, home] == int(np.floor(share * size[0] + 0.5))
            others = np.delete(counts[node], home)
            assert others.max() - others.min() <= 1

    @given(st.integers(1, 9), st.sampled_from([0.25, 0.5, 0.9, 1.0]))
    def test_no_larger_equal_size_would_do(self, rarest, share):
        """With a node per class the size is that of the rarest class, whatever the share."""
        targets = np.repeat(np.arange(4), [rarest, 9, 10, 12])
        dealt = deal(by_class(4, share=share), targets)
        assert {len(r) for r in dealt.values()} == {rarest}

    def test_full_share_means_one_class_only(self):
        targets = np.arange(100) % 10
        for node, rows in deal(by_class(10, share=1.0), targets).items():
            assert set(targets[rows]) == {node}
            assert len(rows) == 10

    def test_all_rows_are_used_where_sizes_permit(self):
        """The odd rows come from one class after the other, so that none runs out before the others."""
        targets = np.repeat([0, 1, 2], 44)  # 22 rows a node: 11 at home, 11 from two other classes
        counts = np.array(
            [np.bincount(targets[r], minlength=3) for r in deal(by_class(6, share=0.5), targets).values()]
        )
        assert counts.sum(axis=0).tolist() == [44, 44, 44]

    def test_what_cannot_be_dealt_is_refused(self):
        with pytest.raises(DataError, match="at least two classes"):
            deal(by_class(2, share=1.0), np.zeros(5, int))
        with pytest.raises(DataError, match="Use fewer nodes"):
            deal(by_class(9, share=1.0), np.array([0, 0, 1, 1]))


class TestByKey:
    def test_clients_are_the_values(self):
        dealt = deal(by_key("ward"), np.zeros(4), groups={"ward": np.array(["b", "a", "b", "c"])})
        assert {k: v.tolist() for k, v in dealt.items()} == {"a": [1], "b": [0, 2], "c": [3]}

    def test_numbers_stay_numbers(self):
        assert list(deal(by_key(np.array([3, 1])), np.zeros(2))) == [1, 3]

    def test_unknown_groups_and_wrong_lengths_are_refused(self):
        with pytest.raises(DataError, match=r"no group 'site'.*'ward'"):
            deal(by_key("site"), np.zeros(2), groups={"ward": np.array([1, 2])})
        with pytest.raises(DataError, match=r"one value per row: 3, not \[2\]"):
            deal(by_key([1, 2]), np.zeros(3))

    def test_test_rows_follow_their_key(self):
        data = from_arrays(
            [[0.0], [1.0], [2.0]], [0, 0, 1], test=([[5.0], [6.0]], [1, 0]), groups={"k": ["a", "b", "a"]}
        )
        from dataclasses import replace

        clients = replace(data, test_groups={"k": np.array(["b", "z"])}).clients()
        assert clients.ids == ("a", "b")
        assert len(clients.test(0)) == 0
        assert clients.test(1).inputs[0].tolist() == [[5.0]]
        assert len(clients.central_test) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: iid(0), "at least 1, not 0"),
        (lambda: iid(2.0), "2.0"),
        (lambda: shards(3, shards_per_node=0), "shards_per_node"),
        (lambda: dirichlet(3, alpha=0.0), "alpha"),
        (lambda: dirichlet(3, alpha=float("nan")), "alpha"),
        (lambda: quantity_skew(3, alpha=-1.0), "alpha"),
        (lambda: by_class(3, share=0.0), "share"),
        (lambda: by_class(3, share=1.1), "1.1"),
        (lambda: by_class(3, share="0.9"), "share must be a number above 0; not '0.9'"),
        (lambda: dirichlet(3, alpha="a"), "alpha must be a number above 0; not 'a'"),
        (lambda: quantity_skew(3, alpha=None), "alpha must be a number"),
        (lambda: dirichlet(3, alpha=1.0, minimum="1"), "minimum must be a whole number of at least 0, not '1'"),
        (lambda: quantity_skew(3, minimum=-1), "minimum must be"),
        (lambda: shards(3, shards_per_node=1.5), "shards_per_node must be a whole number"),
        (lambda: iid(True), "nodes must be a whole number of at least 1, not True"),
    ],
)
def test_impossible_rules_are_refused_when_written(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


@pytest.mark.parametrize("classes", [2, 3, 7, 10])
def test_by_class_goes_from_the_uniform_share(classes):
    targets = np.arange(20 * classes) % classes
    for share in (1 / classes, round(1 / classes, 12)):
        assert sum(len(r) for r in deal(by_class(classes, share=share), targets).values()) == len(targets)
    with pytest.raises(ConfigurationError, match=f"with {classes} classes the share of the home class goes from"):
        deal(by_class(classes, share=0.9 / classes), targets)


@pytest.mark.parametrize("rule", [dirichlet(5, alpha=1.0, minimum=3), quantity_skew(5, minimum=3)])
def test_too_few_rows_are_refused(rule):
    with pytest.raises(DataError, match="5 nodes with at least 3 rows each need more than the 14"):
        deal(rule, np.arange(14) % 2)


@pytest.mark.parametrize("rule", [shards(2), dirichlet(2, alpha=1.0), by_class(2, share=1.0)])
def test_rules_by_target_need_one_number_per_row(rule):
    with pytest.raises(DataError, match=r"shape \[8, 2\]"):
        deal(rule, np.zeros((8, 2)))


def test_a_data_set_deals_by_seed_and_keeps_its_test():
    data = from_arrays(np.arange(40.0)[:, None], np.arange(40) % 4, test=([[1.0]], [0]))
    clients = data.partition(iid(4), seed=3)
    assert clients.fingerprint() == data.partition(iid(4), seed=3).fingerprint()
    assert clients.fingerprint() != data.partition(iid(4), seed=4).fingerprint()
    assert len(clients.central_test) == 1
    with pytest.raises(DataError, match="no natural clients"):
        data.clients()

"""The conformance suite of partitions: a new rule is one line in the list and inherits all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import cloudpickle
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given
from numpy.typing import NDArray

import foedus.data
from foedus.core.random import generator
from foedus.data import by_class, by_key, dirichlet, from_arrays, iid, quantity_skew, shards
from foedus.data.partition import Partition
from foedus.errors import DataError

Dealt = Mapping[Any, NDArray[np.int64]]


class Member(NamedTuple):
    """A rule, and what it promises.

    * ``clients``: the ids that it deals to, of the data below.
    * ``complete``: whether it uses every row.
    * ``apart``: by how much the sizes of two clients may differ; None for any.
    * ``random``: whether the seed matters.
    * ``many``: the same rule for more clients than there are rows; None if the data decides how many there are.
    """

    rule: Partition
    clients: list[Any]
    complete: bool = True
    apart: int | None = None
    random: bool = True
    many: Partition | None = None


odd_even = Partition(
    lambda targets, groups, generator: {i: np.arange(i, len(targets), 2) for i in range(2)}, label="odd_even()"
)
FOUR = [0, 1, 2, 3]
MEMBERS = [
    Member(iid(4), FOUR, apart=1, many=iid(200)),
    Member(shards(4), FOUR, apart=2, many=shards(200)),
    Member(shards(4, shards_per_node=5), FOUR, apart=5, many=shards(19, shards_per_node=5)),
    Member(dirichlet(4, alpha=0.3), FOUR, many=dirichlet(200, alpha=0.3)),
    Member(dirichlet(4, alpha=100.0, minimum=3), FOUR, many=dirichlet(31, alpha=100.0, minimum=3)),
    Member(by_class(4, share=0.5), FOUR, complete=False, apart=0, many=by_class(200, share=0.5)),
    Member(by_class(4, share=1.0), FOUR, complete=False, apart=0, many=by_class(200, share=1.0)),
    Member(quantity_skew(4, alpha=0.5), FOUR, many=quantity_skew(200, alpha=0.5)),
    Member(by_key("ward"), ["a", "b", "c"], random=False),
    Member(by_key(np.arange(92) % 5), [0, 1, 2, 3, 4], random=False),
    Member(odd_even, [0, 1], apart=1, random=False),
]
every = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.rule.label)
seeds = st.integers(0, 2**62)

TARGETS = np.arange(92) % 4
GROUPS = {"ward": np.array(["b", "a", "c", "a"])[np.arange(92) % 4]}


def deal(rule: Partition, seed: int = 0, targets: Any = TARGETS) -> Dealt:
    return rule.deal(targets, GROUPS, generator(seed, "test"))


def same(a: Dealt, b: Dealt) -> bool:
    return list(a) == list(b) and all(a[client].tolist() == b[client].tolist() for client in a)


@every
@given(seeds)
def test_no_row_is_dealt_twice_and_none_that_is_not_there(member: Member, seed: int) -> None:
    dealt = deal(member.rule, seed)
    for rows in dealt.values():
        assert rows.dtype == np.int64
        assert rows.ndim == 1
    rows = np.concatenate(list(dealt.values()))
    assert len(np.unique(rows)) == len(rows)
    assert ((rows >= 0) & (rows < len(TARGETS))).all()
    if member.complete:
        assert len(rows) == len(TARGETS)


@every
@given(seeds)
def test_everybody_gets_something_and_of_about_the_size_that_is_promised(member: Member, seed: int) -> None:
    dealt = deal(member.rule, seed)
    assert list(dealt) == member.clients
    sizes = [len(rows) for rows in dealt.values()]
    assert min(sizes) >= 1
    if member.apart is not None:
        assert max(sizes) - min(sizes) <= member.apart


@every
@given(seeds)
def test_the_seed_decides(member: Member, seed: int) -> None:
    first = deal(member.rule, seed)
    assert same(first, deal(member.rule, seed))
    assert same(first, deal(cloudpickle.loads(cloudpickle.dumps(member.rule)), seed)), "elsewhere it deals otherwise"
    assert same(first, deal(member.rule, seed + 1)) != member.random


@every
@given(st.lists(st.integers(-3, 3), min_size=92, max_size=92), seeds)
def test_whatever_the_targets_rows_are_dealt_once_and_the_arguments_stay(
    member: Member, labels: list[int], seed: int
) -> None:
    targets = np.array(labels)
    assume(len(np.unique(targets)) > 1)
    before = targets.copy()
    try:
        rows = np.concatenate(list(deal(member.rule, seed, targets).values()))
    except DataError:
        assert not member.complete, "a rule that uses every row can always be dealt"
        return
    assert len(np.unique(rows)) == len(rows)
    assert (targets == before).all()


@every
def test_only_the_order_of_the_targets_matters_and_not_how_they_are_written(member: Member) -> None:
    first = deal(member.rule)
    for other in (TARGETS.astype(np.uint8), TARGETS.astype(np.float32), TARGETS * 10 - 7):
        assert same(first, deal(member.rule, targets=other))


@every
def test_more_clients_than_rows_are_refused_with_both_numbers(member: Member) -> None:
    if member.many is not None:
        with pytest.raises(DataError, match=r"(19|31|200).* 92 .*Use (fewer|at most)"):
            deal(member.many)


@every
def test_it_deals_out_a_data_set(member: Member) -> None:
    """Through the front door: rows arrive with their targets, and the fingerprint is that of the seed."""
    data = from_arrays(np.arange(92.0)[:, None], TARGETS, groups=GROUPS)
    clients, again, other = (data.partition(member.rule, seed=s) for s in (3, 3, 4))
    assert list(clients.ids) == member.clients
    assert clients.fingerprint() == again.fingerprint()
    assert (clients.fingerprint() == other.fingerprint()) != member.random
    for position in range(len(clients)):
        own = clients.train(position)
        assert (own.inputs[0][:, 0].astype(int) % 4 == own.targets).all()


@every
def test_its_label_tells_it_from_the_others_and_says_how_to_write_it(member: Member) -> None:
    label = member.rule.label
    assert [m.rule.label for m in MEMBERS].count(label) == 1
    written = label.partition("(")[0]
    if written in foedus.data.__all__ and "..." not in label:
        assert same(deal(eval(label, dict(vars(foedus.data.partition)))), deal(member.rule))

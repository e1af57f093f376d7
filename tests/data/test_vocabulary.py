"""A vocabulary from sums: exactly the words that occur, with how many clients have them."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.aggregate import mean
from foedus.core.population import Examples
from foedus.data import Vocabulary, federated_vocabulary, one_hot
from foedus.errors import ConfigurationError, DataError

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@given(st.lists(st.lists(words, max_size=12), min_size=1, max_size=5))
def test_it_equals_a_count_over_pooled_words(lists):
    found = federated_vocabulary(dict(enumerate(lists)))
    clients = Counter(word for own in lists for word in set(own))
    rows = Counter(word for own in lists for word in own)
    assert found.words == tuple(sorted(clients))
    assert found.clients == tuple(clients[w] for w in found.words)
    assert found.rows == tuple(rows[w] for w in found.words)


def test_tables_grow_until_all_words_come_out():
    lists = {c: [f"word {i}" for i in range(c, 900, 3)] for c in range(3)}
    assert len(federated_vocabulary(lists).words) == 900


def test_a_hundred_words_come_out_of_the_first_tables():
    """Taking words out one after another matters: without it a quarter as many would already get stuck."""
    rounds = []
    exact = mean(weighted=False)
    counting = exact._replace(init=lambda layout: rounds.append(layout.size) or exact.init(layout))
    lists = {c: [f"word {i}" for i in range(c, 100, 2)] for c in range(2)}
    assert len(federated_vocabulary(lists, aggregator=counting).words) == 100
    assert rounds == [3 * 64 * (3 + 40)]


def test_rare_words_are_left_out_on_demand():
    lists = {"a": ["x", "x", "y"], "b": ["y"], "c": ["z", None]}
    assert federated_vocabulary(lists, minimum_clients=2).words == ("y",)


def test_words_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"'long' has 4 bytes.*longest=3"):
        federated_vocabulary({"a": ["long"]}, longest=3)
    with pytest.raises(DataError, match="zero byte"):
        federated_vocabulary({"a": ["\0"]})


def test_no_client_is_refused():
    with pytest.raises(DataError, match="no client"):
        federated_vocabulary({})


def test_codes_and_columns():
    vocabulary = Vocabulary(("no", "yes"))
    assert vocabulary.codes(["yes", None, "no"]).tolist() == [1, 2, 0]
    assert vocabulary.spread(["yes", None, "no"]).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_one_hot_keeps_the_order_of_columns():
    examples = Examples.of([[7.0, 1.0, 8.0, 3.0], [9.0, np.nan, 6.0, 4.0]], [0, 1])
    spread = one_hot({1: [1, 2], 3: [3, 4]}).apply(examples).inputs[0]
    assert spread.tolist() == [[7, 1, 0, 8, 1, 0], [9, 0, 0, 6, 0, 1]]
    with pytest.raises(ConfigurationError, match="at least one column"):
        one_hot({})

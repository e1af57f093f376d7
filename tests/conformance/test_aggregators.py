"""The conformance suite of aggregators: a new member is one line in a list and inherits all of it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import cloudpickle
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, add, fold, lift, mean, message_bytes
from foedus.core.entropy import entropy
from foedus.core.feedback import error_feedback
from foedus.core.quantise import eden, qsgd, quantise, sign_majority
from foedus.core.robust import (
    bulyan,
    centred_clipping,
    dnc,
    fltrust,
    geometric_median,
    krum,
    median,
    multi_krum,
    trimmed_mean,
)
from foedus.core.rotation import rotate
from foedus.core.sparse import random_mask, subsample, top_k
from foedus.core.stage import chain, clip
from foedus.core.values import Context, Message, State, Update
from foedus.errors import ConfigurationError, SecureAggregationFailed, SumOverflow, UpdateRefused
from foedus.privacy.distributed import gaussian_shares, skellam_shares, trusted_sum
from foedus.privacy.mechanisms import adaptive, central, local
from foedus.privacy.strategies import banded, tree
from foedus.privacy.streams import correlated
from foedus.secure.graph import Withstand
from foedus.secure.homomorphic import encrypted, silo_key
from foedus.secure.masked import masked
from foedus.tree import Layout

from .updates import CONTEXT, cohorts, copies, encoded, merged_in_some_order, same_bits

WEIGHTED = [mean()]
EVEN = [
    mean(weighted=False),
    median(),
    trimmed_mean(0.2),
    geometric_median(),
    geometric_median(weighted=True),
]
PICKY = [
    krum(0),
    krum(1),
    multi_krum(1),
    multi_krum(0, keep=2),
    bulyan(0),
    bulyan(1),
    dnc(0),
    dnc(2, iterations=2),
]
ROBUST = [*PICKY, fltrust(trusted=0), centred_clipping(1.0), centred_clipping(1e-3, iterations=3)]
COMPRESSED = [
    chain(rotate(), mean()),
    chain(rotate(own=True), median()),
    chain(random_mask(0.5), mean()),
    chain(rotate(), quantise(8, scale=2.0**23), mean()),
    chain(quantise(3), mean()),
    chain(eden(2), median()),
    chain(subsample(0.5), qsgd(3), entropy(), mean()),
    sign_majority(),
    chain(rotate(), sign_majority()),
    error_feedback(chain(top_k(0.5), mean())),
]
PRIVATE = [
    central(clip=1.0, noise_multiplier=0.5, cohort=3),
    central(clip=1.0, noise_multiplier=0.5, cohort=3, most=10),
    adaptive(noise_multiplier=1.0, cohort=40),
    chain(rotate(), central(clip=1.0, noise_multiplier=0.5, cohort=3)),
    correlated(banded(9, separation=3), clip=1.0, noise_multiplier=0.5, cohort=3),
    correlated(tree(9), clip=1.0, noise_multiplier=0.5, cohort=3),
    chain(qsgd(3), central(clip=1.0, noise_multiplier=0.5, cohort=3)),
    trusted_sum(gaussian_shares(clip=1.0, noise_multiplier=0.5, cohort=40, honest=1), planned=3),
    trusted_sum(skellam_shares(clip=1.0, noise_multiplier=1.0, cohort=40, honest=1), planned=3),
    chain(local(clip=1.0, noise_multiplier=0.5), mean()),
    chain(local(clip=1.0, noise_multiplier=0.5), median()),
]
NINE = Withstand(clients=9, corrupt=0.0)
MASKED = [
    masked(NINE, bound=2.0**21, least=2),
    masked(NINE, bits=12, bound=2.0**21, most=10_000, least=2),
    masked(NINE, bits=5, planned=9.0),
    chain(rotate(), masked(NINE, bound=1.0)),
    chain(random_mask(0.5), masked(NINE, most=10)),
    chain(rotate(), quantise(8, scale=2.0**23), masked(NINE, most=100)),
    chain(local(clip=1.0, noise_multiplier=0.5), masked(NINE)),
]
KEY = silo_key()
SEALED = [
    encrypted(9, key=KEY, bound=2.0**21),
    encrypted(9, key=KEY, bits=12, bound=2.0**21, most=10_000),
    chain(random_mask(0.5), encrypted(9, key=KEY, bits=16)),
]
CLIPPED = [chain(clip(3.0), mean()), chain(clip(3.0), clip(1.0), median())]
MEMBERS = [*WEIGHTED, *EVEN, *ROBUST, *COMPRESSED, *PRIVATE, *CLIPPED, *MASKED, *SEALED]
SUMS = [m for m in MEMBERS if m.additive]
IDENTICAL = [*WEIGHTED, *EVEN]  # those that give back what all clients agree on

every = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.label)
sums = pytest.mark.parametrize("member", SUMS, ids=lambda m: m.label)


def layout_of(size: int) -> Layout:
    return Layout(("p",), ((size,),), ("float32",))


def decoded(member: Aggregator, message: Message, context: Context, state: State | None = None) -> Any:
    """The update and the next state as bytes, or the text of what is wrong with so few updates."""
    try:
        state = member.init(layout_of(context.size)) if state is None else state
        vector, state = member.decode(state, message, context)
    except (ConfigurationError, SecureAggregationFailed) as error:
        return str(error)
    return vector.tobytes(), {name: array.tobytes() for name, array in state.items()}


@every
@given(cohorts(), st.integers(0, 2**32))
def test_neither_order_nor_place_of_merging_changes_a_bit(member: Aggregator, cohort: list[Update], seed: int) -> None:
    messages, rng = encoded(member, cohort), np.random.default_rng(seed)
    one, other = (merged_in_some_order(member, messages, rng) for _ in range(2))
    assert same_bits(one, other)
    context = CONTEXT._replace(size=len(cohort[0].vector))
    assert decoded(member, one, context) == decoded(member, other, context)


@every
@given(cohorts(least=3))
def test_merge_is_commutative_and_associative(member: Aggregator, cohort: list[Update]) -> None:
    a, b, c = encoded(member, cohort[:3])
    merge = member.merge
    assert same_bits(merge(*copies([a, b])), merge(*copies([b, a])))
    left = merge(merge(*copies([a, b])), *copies([c]))
    right = merge(*copies([a]), merge(*copies([b, c])))
    assert same_bits(left, right)


@every
@given(cohorts())
def test_encoding_and_decoding_change_none_of_their_arguments(member: Aggregator, cohort: list[Update]) -> None:
    state = member.init(layout_of(len(cohort[0].vector)))
    before, kept = cohort[0].vector.copy(), {n: a.copy() for n, a in state.items()}
    context = CONTEXT._replace(size=len(cohort[0].vector))
    message = member.admit(member.encode(cohort[0], context), context)
    (sent,) = copies([message])
    decoded(member, message, context, state)
    assert cohort[0].vector.tobytes() == before.tobytes()
    assert same_bits(state, kept)
    assert same_bits(message, sent)


@every
def test_encoding_is_a_function_of_update_and_context(member: Aggregator) -> None:
    update = Update(np.linspace(-1, 1, 5, dtype=np.float32), 7.0)
    once, again = member.encode(update, CONTEXT), member.encode(update, CONTEXT)
    assert same_bits(once, again) == (member.sealed is None), "no two ciphertexts are the same; their sums are"


@pytest.mark.parametrize("member", IDENTICAL, ids=lambda m: m.label)
@given(cohorts())
def test_what_all_clients_agree_on_is_what_comes_out(member: Aggregator, cohort: list[Update]) -> None:
    vector = cohort[0].vector
    total = fold(member, encoded(member, [Update(vector, u.weight) for u in cohort]))
    assert total is not None
    found, _ = member.decode({}, total, CONTEXT)
    smallest = min(u.weight for u in cohort)
    np.testing.assert_allclose(found, vector, rtol=1e-13, atol=2.0**-59 / min(smallest, 1))


@every
def test_a_cohort_of_nobody_has_no_message(member: Aggregator) -> None:
    assert fold(member, []) is None


@every
def test_a_message_holds_arrays_only_and_is_no_larger_than_it_must_be(member: Aggregator) -> None:
    vector = np.ones(1000, np.float32)
    message = member.encode(Update(vector, 3.0), CONTEXT)
    assert all(isinstance(array, np.ndarray) for array in message.values())
    small = member in COMPRESSED or "qsgd" in member.label or member.masking is not None or "trusted" in member.label
    least = 0 if small else vector.nbytes
    most = vector.nbytes + 64 if member.sealed is None else 1.01 * member.sealed.bytes(len(vector))
    assert least <= message_bytes(message) <= most


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [mean(), mean(weighted=False)], ids=lambda m: m.label)
@given(cohorts())
def test_the_mean_is_the_exact_one_of_rational_arithmetic(member: Aggregator, cohort: list[Update]) -> None:
    total = fold(member, encoded(member, cohort))
    assert total is not None
    found, _ = member.decode({}, total, CONTEXT)
    units = [round(u.weight * 2**20) if member.label == "mean()" else 2**20 for u in cohort]
    exact_weights = [Fraction(n, 2**20) for n in units]
    for i, value in enumerate(found):
        terms = [Fraction(float(u.vector[i])) * w for u, w in zip(cohort, exact_weights, strict=True)]
        exact = sum(terms) / sum(exact_weights)
        # one rounding of each product, 2⁻⁶¹ of fixed point each, and three roundings at the end
        slack = (sum(map(abs, terms)) * Fraction(2) ** -53 + len(cohort) * Fraction(2) ** -60) / sum(exact_weights)
        assert abs(Fraction(float(value)) - exact) <= slack + abs(exact) * Fraction(2) ** -51


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=30), st.integers(1, 500))
def test_sums_of_float32_times_numbers_of_examples_are_exact(numbers: list[int], examples: int) -> None:
    """Nothing is rounded at all: huge and tiny terms cancel without a trace."""
    huge, tiny = np.array([2.0**30], np.float32), np.array([2.0**-30], np.float32)
    vectors = [np.array([n * 2.0**-25], np.float32) for n in numbers] + [huge, tiny, -huge]
    total = fold(mean(), [mean().encode(Update(v, float(examples)), CONTEXT) for v in vectors])
    assert total is not None
    exact = examples * (sum(Fraction(n, 2**25) for n in numbers) + Fraction(1, 2**30))
    assert Fraction(int(total["high"][0]), 2**20) + Fraction(int(total["low"][0]), 2**60) == exact


@sums
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_enters_a_sum(member: Aggregator, value: float) -> None:
    with pytest.raises(SumOverflow, match="not finite"):
        member.encode(Update(np.array([1.0, value], np.float32), 2.0), CONTEXT)
    total = lift({"values": np.ones(2), "weight": np.array([2**20])})
    (before,) = copies([total])
    with pytest.raises(SumOverflow, match="not finite"):
        add(total, {"values": np.array([1.0, value]), "weight": np.array([2**20])})
    assert same_bits(total, before)


@pytest.mark.parametrize("member", [mean(), mean(weighted=False)], ids=lambda m: m.label)
def test_an_update_beyond_the_range_is_refused_by_itself(member: Aggregator) -> None:
    """Whether a client is refused must not depend on who else has arrived."""
    with pytest.raises(SumOverflow, match="2⁴²"):
        member.encode(Update(np.array([1e13], np.float32), 1.0), CONTEXT)
    with pytest.raises(SumOverflow):
        member.encode(Update(np.array([1e300]), 1.0), CONTEXT)


@given(st.lists(st.floats(0.5, 1), min_size=2, max_size=6))
def test_a_sum_beyond_the_range_is_refused_and_nothing_has_changed(shares: list[float]) -> None:
    rule = mean(weighted=False)
    messages = [rule.encode(Update(np.array([s * 2.0**41 - 1, 3.0]), 1.0), CONTEXT) for s in shares]
    total = rule.merge(*copies([messages[0], rule.encode(Update(np.array([1.0, 1.0]), 1.0), CONTEXT)]))
    added = 1
    for message in messages[1:]:
        before, sent = copies([total, message])
        try:
            total = rule.merge(total, message)
            added += 1
        except SumOverflow:
            assert same_bits(total, before)
            assert same_bits(message, sent)
    assert added < 4  # each counts as 2⁴⁰ or more, and there is room for less than 2⁴²
    with pytest.raises(SumOverflow, match="exact sums hold"):
        fold(rule, copies([total, total, total]))


def test_no_sum_that_is_let_in_wraps_around() -> None:
    """At the very edge of the range, the limbs hold what they must."""
    rule, edge = mean(weighted=False), np.array([2.0**40, -(2.0**40), 2.0**-60])
    total = fold(rule, [rule.encode(Update(edge, 1.0), CONTEXT) for _ in range(3)])
    assert total is not None
    assert rule.decode({}, total, CONTEXT)[0].tolist() == edge.tolist()


def test_the_number_of_contributors_is_bounded() -> None:
    full = lift({"values": np.zeros(1), "weight": np.array([2**20])}) | {"count": np.array([2**22 - 1])}
    with pytest.raises(SumOverflow, match="4194304 weighted updates"):
        add(full, {"values": np.zeros(1), "weight": np.array([2**20])})


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf, 2.0**33])
def test_weights_that_cannot_be_are_refused_with_the_clients_number(weight: float) -> None:
    with pytest.raises(UpdateRefused, match=r"client 5 has "):
        mean().encode(Update(np.ones(1), weight), CONTEXT._replace(client=5))


def test_updates_of_different_lengths_do_not_add_up() -> None:
    a, b = (mean().encode(Update(np.ones(n), 1.0), CONTEXT) for n in (2, 3))
    with pytest.raises(ConfigurationError, match="3 and 2 entries"):
        mean().merge(a, b)


@pytest.mark.slow
def test_a_thousand_clients_of_a_real_size_in_two_orders() -> None:
    rng = np.random.default_rng(0)
    updates: list[NDArray[Any]] = [
        rng.standard_normal(20_000, np.float32) * 10.0 ** rng.integers(-8, 3) for _ in range(1000)
    ]
    messages = [mean().encode(Update(u, float(rng.integers(1, 900))), CONTEXT) for u in updates]
    forward = fold(mean(), copies(messages))
    halves = [fold(mean(), copies([messages[i] for i in part])) for part in np.array_split(rng.permutation(1000), 7)]
    assert forward is not None
    assert same_bits(forward, fold(mean(), [h for h in halves if h is not None]) or {})


@sums
@given(cohorts(least=1))
def test_encoding_all_at_once_is_encoding_one_by_one(member: Aggregator, cohort: list[Update]) -> None:
    if member.shortcut is None:
        return
    contexts = [CONTEXT._replace(client=i) for i in range(len(cohort))]
    lifted = (lambda message: message) if member.masking is not None else lift
    total = fold(member, [lifted(m) for m in encoded(member, cohort)])
    assert total is not None
    assert same_bits(total, member.shortcut(cohort, contexts))


def test_encoding_all_at_once_in_many_blocks() -> None:
    rng = np.random.default_rng(0)
    cohort = [Update(rng.normal(size=40_000).astype("f4"), float(i + 1)) for i in range(11)]
    member = mean()
    assert member.shortcut is not None
    total = fold(member, encoded(member, cohort))
    assert total is not None
    assert same_bits(total, member.shortcut(cohort, [CONTEXT] * 11))


@pytest.mark.parametrize("member", [mean(), chain(mean()), mean(weighted=False)], ids=lambda m: m.label)
def test_a_replaced_encode_or_merge_leaves_no_shortcut_past_it(member: Aggregator) -> None:
    assert member.shortcut is not None
    assert cloudpickle.loads(cloudpickle.dumps(member)).shortcut is not None, "nor does another process lose it"
    assert member._replace(label="mine", decode=lambda s, m: member.decode(s, m)).shortcut is not None
    assert member._replace(encode=lambda u, c: member.encode(u, c)).shortcut is None
    assert member._replace(merge=lambda a, b: member.merge(a, b)).shortcut is None

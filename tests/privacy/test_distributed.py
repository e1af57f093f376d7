"""Noise in shares: the bound of one client, what a sum of shares is worth, and that sums hardly ever wrap around."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy import special

import foedus as fd
from foedus.core.aggregate import Aggregator, Message, fold
from foedus.core.stage import Stage, chain
from foedus.core.values import SERVER, Context, Update
from foedus.errors import (
    ConfigurationError,
    IncompatibleStages,
    NoGuarantee,
    NothingToAggregate,
    SumOverflow,
    UpdateRefused,
)
from foedus.privacy.accounting import pld, rdp
from foedus.privacy.claims import round_event
from foedus.privacy.distributed import gaussian_shares, rounded, skellam_shares, trusted_sum
from foedus.privacy.events import Gaussian, SharedGaussian, SharedSkellam, as_json, of_json
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.secure.graph import Withstand
from foedus.tree import Layout

KINDS = [gaussian_shares, skellam_shares]


def context(size: int, client: int = 0, round: int = 2) -> Context:
    return Context(5, round, client, size=size, secret=known_to_all_who_know_the_seed)


def shares(make: Any = gaussian_shares, **changes: Any) -> Stage:
    told = {"clip": 0.7, "noise_multiplier": 1.0, "cohort": 20, "honest": 10, "bits": 20} | changes
    made: Stage = make(**told)
    return made


def summed(rule: Aggregator, vectors: list[NDArray[Any]], round: int = 2) -> NDArray[Any]:
    sent: list[Message] = []
    for i, vector in enumerate(vectors):
        own = context(len(vector), i, round)
        sent.append(rule.admit(rule.encode(Update(vector, 3.0), own), own))
    total = fold(rule, sent)
    assert total is not None
    return np.asarray(rule.decode({}, total, context(len(vectors[0]), SERVER, round))[0])


# --- the bound ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
@given(st.integers(1, 60), st.integers(0, 2**32), st.booleans(), st.sampled_from([1e-9, 0.3, 1.0, 1e12]))
def test_one_client_changes_a_sum_by_at_most_the_bound(
    make: Any, size: int, seed: int, rotated: bool, scale: float
) -> None:
    """Exactly, in whole steps: the same words give the same noise, which drops out of a difference with zeros."""
    stage = shares(make, rotated=rotated)
    vector = (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)
    with_it, without = (stage.encode(Update(v, 1.0), context(size)).vector for v in (vector, 0 * vector))
    change = (with_it - without).tolist()
    probe = np.zeros(stage.size(size, None))
    probe[0] = 1
    step = np.abs(stage.decode(Update(probe, 1.0), context(size)).vector).max() if not rotated else None
    if step is not None:
        assert sum(n**2 for n in change) <= (0.7 / step) ** 2 * (1 + 1e-12)
    back = stage.decode(Update(np.array(change, np.float64), 1.0), context(size)).vector
    assert np.linalg.norm(back) <= 0.7 * (1 + 1e-6)


@given(st.integers(1, 300), st.integers(0, 2**32), st.floats(3.0, 60.0))
@settings(max_examples=30)
def test_rounding_keeps_the_bound_exactly_and_is_unbiased(size: int, seed: int, reach: float) -> None:
    vector = np.random.default_rng(seed).normal(size=size)
    reach = max(reach, 2 * math.sqrt(size))
    room = reach - math.sqrt(size)
    found = [rounded(vector, context(size, i), factor=1.0, room=room, reach=reach) for i in range(40)]
    assert all(sum(int(n) ** 2 for n in row) <= reach**2 for row in found)
    short = vector * min(1.0, room / np.linalg.norm(vector))
    assert abs(np.mean(np.mean(found, 0) - short)) < 5 * 0.5 / math.sqrt(40 * size)
    assert all((np.abs(row - short) < 1 + 1e-4).all() for row in found), "to one of the two neighbours"


# --- the sum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("rotated", [True, False])
def test_a_sum_is_that_of_the_updates_with_the_noise_of_all_shares(make: Any, rotated: bool) -> None:
    size, count, rng = 20_000, 16, np.random.default_rng(1)
    vectors = [v / np.linalg.norm(v) * 0.5 for v in rng.normal(size=(count, size))]
    rule = trusted_sum(shares(make, rotated=rotated, bits=24), planned=20)
    noise = (summed(rule, vectors) - np.sum(vectors, 0) / 20) * 20 / 0.7
    assert np.std(noise) == pytest.approx(math.sqrt(count / 10), rel=0.02), "the noise of 16 where 10 are enough"
    assert abs(np.mean(noise)) < 5 * np.std(noise) / math.sqrt(size)


def test_a_sum_hardly_ever_wraps_even_if_all_updates_are_one() -> None:
    """Twenty times the same update, as sharp as can be, with the coarsest grid that there is."""
    size = 4096
    rule = trusted_sum(shares(bits=14, noise_multiplier=0.5, honest=20), planned=20)
    spike = np.zeros(size, np.float32)
    spike[7] = 1.0
    for round in range(1, 6):
        noise = summed(rule, [spike] * 20, round) * 20 - 14 * (np.arange(size) == 7)
        assert np.abs(noise).max() < 3.0, "a wrapped entry would be off by hundreds"


def test_without_rotation_one_entry_may_hold_all_of_every_update() -> None:
    rule = trusted_sum(shares(rotated=False), planned=20)
    assert summed(rule, [np.array([9.0, 0.0])] * 20)[0] == pytest.approx(0.7, abs=0.2)


def test_the_same_sum_in_any_order_and_the_least_of_it_are_kept() -> None:
    rule = trusted_sum(shares(), planned=20)
    with pytest.raises(NothingToAggregate, match=r"9 clients have contributed, .* of 10 and more"):
        summed(rule, [np.ones(5)] * 9)
    assert summed(rule, [np.ones(5)] * 10).shape == (5,)


# --- what it is worth ---------------------------------------------------------------------------------------


def renyi(p: NDArray[np.float64], shift: int, order: float) -> float:
    """Of a distribution over whole numbers and itself shifted, by the definition."""
    a, b = p[shift:], p[:-shift]
    kept = (a > 0) & (b > 0)
    return float(special.logsumexp(order * np.log(a[kept]) + (1 - order) * np.log(b[kept])) / (order - 1))


@pytest.mark.parametrize("shares", [2, 5, 40])
@pytest.mark.parametrize("spread", [0.5, 0.6, 1.0, 2.0])
def test_a_sum_of_discrete_gaussians_is_worth_no_more_than_claimed(shares: int, spread: float) -> None:
    x = np.arange(-60, 61)
    one = np.exp(-(x**2) / (2 * spread**2))
    total = one = one / one.sum()
    for _ in range(shares - 1):
        total = np.convolve(total, one)
        total = total[len(total) // 2 - 60 * 8 : len(total) // 2 + 60 * 8 + 1] if len(total) > 961 else total
    total = np.where(total > 1e-250, total, 0)
    for shift in (1, 2, 4):
        event = SharedGaussian(spread * math.sqrt(shares) / shift, shares, spread, entries=1)
        for order in (1.5, 2.0, 8.0):
            assert renyi(total, shift, order) <= order * event.rho * (1 + 1e-9)


@pytest.mark.parametrize("variance", [2.0, 30.0, 400.0])
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_skellam_noise_is_worth_no_more_than_claimed(variance: float, shift: int) -> None:
    reach = int(14 * math.sqrt(variance)) + 40
    p = special.ive(np.abs(np.arange(-reach, reach + 1)), variance)
    event = SharedSkellam(math.sqrt(variance) / shift, shares=2, spread=math.sqrt(variance))
    for order in (2.0, 3.0, 10.0):
        assert renyi(p, shift, order) <= event.divergence(order)
    assert event.divergence(2.5) == event.divergence(3.0), "proven for whole orders only"


def test_shares_cost_about_what_central_noise_does() -> None:
    central = rdp([(Gaussian(4.0), 10)], 1e-5)
    assert rdp([(SharedGaussian(4.0, 100), 10)], 1e-5) == pytest.approx(central, rel=1e-6)
    assert central < rdp([(SharedSkellam(4.0, 100, 64.0), 10)], 1e-5) < 1.01 * central
    assert rdp([(SharedGaussian(4.0, 100, spread=0.5), 10)], 1e-5) > 10 * central, "a grid too coarse costs"


@pytest.mark.parametrize("event", [SharedGaussian(1.0, 5), SharedSkellam(1.0, 5, 64.0)])
def test_shares_have_no_privacy_loss_distribution_and_survive_json(event: Any) -> None:
    with pytest.raises(NoGuarantee, match="use rdp"):
        pld([(event, 1)], 1e-5)
    assert of_json(as_json(event)) == event


# --- refusals -----------------------------------------------------------------------------------------------


def test_too_few_bits_are_refused_before_anybody_has_trained() -> None:
    rule = trusted_sum(shares(bits=8), planned=20)
    with pytest.raises(NoGuarantee, match=r"8 bits are too few for 199,210 entries .* Write more bits$"):
        rule.init(Layout(("p",), ((199_210,),), ("float32",)))
    with pytest.raises(NoGuarantee, match=r"or rotated=True"):
        trusted_sum(shares(bits=12, rotated=False), planned=20).init(Layout(("p",), ((100_000,),), ("float32",)))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="30 cannot be honest"):
        shares(honest=30)
    with pytest.raises(IncompatibleStages, match="does not mask"):
        chain(shares(), fd.mean())
    with pytest.raises(IncompatibleStages, match="adds up shares"):
        trusted_sum(fd.clip(1.0), planned=3)
    with pytest.raises(IncompatibleStages, match="both add noise"):
        chain(fd.privacy.local(clip=1.0, noise_multiplier=1.0), trusted_sum(shares(), planned=20))
    algorithm = fd.fedavg(fd.local_sgd(lr=0.1), aggregator=trusted_sum(shares(), planned=20))
    with pytest.raises(NoGuarantee, match="server, which sees who takes part"):
        round_event(algorithm, fd.poisson(0.5), hidden=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rotated", [True, False])
def test_an_update_that_is_not_finite_never_gets_noise(bad: float, rotated: bool) -> None:
    with pytest.raises(SumOverflow, match="not finite"):
        shares(rotated=rotated).encode(Update(np.array([1.0, bad]), 1.0), context(2))


def test_a_message_of_another_form_is_refused() -> None:
    rule = trusted_sum(shares(), planned=20)
    message = rule.encode(Update(np.ones(5), 1.0), context(5))
    for values in (message["values"][:-1], message["values"].astype(np.int64), None):
        with pytest.raises(UpdateRefused):
            rule.admit({} if values is None else {"values": values}, context(5))


# --- under masks --------------------------------------------------------------------------------------------

WITHSTAND = Withstand(clients=20, corrupt=0.1, dropouts=0.1)


@pytest.mark.parametrize("make", KINDS)
def test_masked_sums_are_those_of_trusted_ones_to_the_bit(make: Any) -> None:
    own = shares(make)
    vectors = list(np.random.default_rng(3).normal(size=(14, 300)))
    masks = chain(own, fd.masked(WITHSTAND, least=12, planned=20))
    found = [summed(rule, vectors) for rule in (masks, trusted_sum(own, planned=20))]
    assert (found[0] == found[1]).all()
    assert masks.event == own.event


@pytest.mark.parametrize("make", KINDS)
def test_a_sum_of_shares_is_divided_by_what_was_planned_or_refused(make: Any) -> None:
    """Fewer came than planned: what comes out is less, and not divided by how many they are."""
    own = shares(make, noise_multiplier=1e-3, bits=24, honest=10)
    with pytest.raises(IncompatibleStages, match=r"Say by what instead: masked\(..., planned=COHORT\)"):
        chain(own, fd.masked(WITHSTAND, least=12))
    rule = chain(own, fd.masked(WITHSTAND, least=12, planned=20))
    vectors = [np.full(4, 0.25)] * 12
    np.testing.assert_allclose(summed(rule, vectors), 0.25 * 12 / 20, atol=0.01)


def test_masks_that_would_show_too_small_a_sum_are_refused() -> None:
    def event(least: int) -> Any:
        rule = chain(shares(honest=10), fd.masked(WITHSTAND, least=least, planned=20))
        return round_event(fd.fedavg(fd.local_sgd(lr=0.1), aggregator=rule), fd.uniform(20))

    assert event(12) == SharedGaussian(1.0, 10)
    with pytest.raises(NoGuarantee, match=r"sums of 11 clients, of whom 2 may be corrupt.*least=12\), or honest=9"):
        event(11)

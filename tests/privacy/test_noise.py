"""The noise is the discrete Gaussian to the last bit that matters, and comes from where it should."""

from __future__ import annotations

import itertools
import math
import pickle
from decimal import Decimal, localcontext

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from foedus.core.values import Context
from foedus.errors import ConfigurationError
from foedus.privacy.blocks import _Left, wide_gaussian
from foedus.privacy.noise import (
    add_discrete_gaussian,
    discrete_gaussian,
    keyed,
    known_to_all_who_know_the_seed,
    skellam,
    source,
    system,
)
from foedus.privacy.slots import Slots, Wanted
from foedus.privacy.tables import Table, _reach
from foedus.privacy.tables import gaussian as _gaussian
from foedus.privacy.tables import skellam as _skellam

COUNTED = Context(seed=11, round=3, client=-1, secret=known_to_all_who_know_the_seed)


def draws(count: int, sigma: float, purpose: str = "test") -> NDArray[np.int64]:
    return discrete_gaussian(COUNTED, purpose, np.zeros(count), sigma=sigma)


def masses(sigma: float) -> NDArray[np.float64]:
    """P(x) for x = −13 σ … 13 σ, by the definition."""
    x = np.arange(-math.ceil(13 * sigma), math.ceil(13 * sigma) + 1)
    p = np.exp(-(x**2) / (2 * sigma**2))
    return np.asarray(p / p.sum())


def far_from(found: NDArray[np.int64], sigma: float) -> float:
    """The p-value of a χ² test of draws against the discrete Gaussian."""
    p = masses(sigma)
    reach = len(p) // 2
    seen = np.bincount(found + reach, minlength=len(p))
    common = p * len(found) >= 20
    observed, expected = [np.append(a[common], a[~common].sum()) for a in (seen, p * len(found))]
    kept = expected > 0
    return float(stats.chisquare(observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()).pvalue)


# --- the distribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.7, 40.0])
def test_the_table_is_the_distribution_to_less_than_1e_15(sigma: float) -> None:
    """Σ |p − q| / 2 of what is drawn and of the definition in 60 digits, the tail that is cut off included."""
    with localcontext() as exact:
        exact.prec = 60
        weights = [(-(Decimal(n) ** 2) / (2 * Decimal(sigma) ** 2)).exp() for n in range(math.ceil(40 * sigma))]
        assert apart(weights, _gaussian(sigma)) < Decimal("1e-35")


@pytest.mark.parametrize("variance", [0.25, 1.0, 13.7, 900.0])
def test_the_table_of_skellam_is_the_difference_of_two_poissons(variance: float) -> None:
    """Against the sum over k of P(k + n) P(k), in 60 digits."""
    with localcontext() as exact:
        exact.prec = 60
        half, reach = Decimal(variance) / 2, _reach(variance) + 40
        poisson = [(-half).exp()]
        for k in range(1, reach + math.ceil(10 * variance**0.5 + variance)):
            poisson.append(poisson[-1] * half / k)
        weights = [sum(a * b for a, b in zip(poisson, poisson[n:], strict=False)) for n in range(reach)]
        assert apart(weights, _skellam(variance)) < Decimal("1e-35")


def apart(weights: list[Decimal], law: Slots) -> Decimal:
    """Σ |p − q| / 2 of a law, slots and rest together, and of what magnitudes are worth on one side."""
    total = weights[0] + 2 * sum(weights[1:])
    wanted = [weights[0] / total] + [2 * w / total for w in weights[1:]]
    assert isinstance(law.rest, Table)
    left = Decimal(len(law.values) - law.decided) / len(law.values)
    got = [left * (b - a) / (1 << 127) for a, b in itertools.pairwise([0, *law.rest.thresholds, 1 << 127])]
    for magnitude, slots in enumerate(np.bincount(np.abs(law.values[: law.decided])).tolist()):
        got[magnitude] += Decimal(slots) / len(law.values)
    got += [Decimal(0)] * (len(wanted) - len(got))
    return sum((abs(a - b) for a, b in zip(wanted, got, strict=True)), Decimal(0)) / 2


LAWS = [_gaussian(0.5), _gaussian(3.0), _gaussian(200.0), _skellam(0.25), _skellam(1e4)]


@pytest.mark.parametrize("law", LAWS)
def test_as_many_slots_are_positive_as_negative_and_most_decide(law: Slots) -> None:
    assert len(law.values) == 2**16
    assert law.values[0] == 0, "a source of zeros gives no noise"
    found, counts = np.unique(law.values[: law.decided], return_counts=True)
    assert (found == -found[::-1]).all()
    assert (counts == counts[::-1]).all()
    assert not law.values[law.decided :].any()
    assert 0.94 * 2**16 < law.decided < 2**16


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_noise_that_is_added_in_place_is_that_which_is_drawn(dtype: str) -> None:
    whole = np.random.default_rng(0).integers(-1000, 1000, 70_001).astype(dtype)
    noise = discrete_gaussian(COUNTED, "test", whole, sigma=30_000.0)
    found = whole.copy()
    add_discrete_gaussian(found, COUNTED, "test", sigma=30_000.0)
    assert found.dtype == whole.dtype
    assert (found.astype(np.int64) == whole.astype(np.int64) + noise).all()


def test_a_keyed_sources_words_depend_on_what_is_protected_before_any_noise() -> None:
    """Also those of what the first look-up does not decide."""
    seen = []

    def watched(context: Context, purpose: str, about: NDArray[np.float64], count: int) -> NDArray[np.uint64]:
        seen.append(about.tolist())
        return keyed(b"k" * 32)(context, purpose, about, count)

    add_discrete_gaussian(np.arange(500.0), COUNTED._replace(secret=watched), "test", sigma=1e9)
    assert len(seen) >= 2
    assert all(about == list(range(500)) for about in seen)


@pytest.mark.parametrize("table", [law.rest for law in LAWS])
def test_the_guide_finds_what_a_binary_search_does(table: Table) -> None:
    """At, just below and just above every threshold, at the ends, and at random."""
    near = (table.first[:-1, None].astype(object) + np.array([-1, 0, 1])).ravel()
    words = np.array([*(min(max(w, 0), 2**31 - 1) for w in near), 0, 2**31 - 1], np.uint32)
    words = np.append(words, np.random.default_rng(0).integers(2**31, size=5000, dtype=np.uint32))
    assert table.below(words).tolist() == np.searchsorted(table.first, words, side="right").tolist()


WIDE = [1025.0, 4096.0, 9000.0, 40_000.0]


def left_of(law: Slots) -> _Left:
    assert isinstance(law.rest, _Left)
    return law.rest


@pytest.mark.parametrize("sigma", WIDE)
def test_blocks_and_what_they_leave_are_the_distribution(sigma: float) -> None:
    """Every number's probability by slots, and by tries in proportion to what is left, against the definition."""
    law = wide_gaussian(sigma)
    left, width = left_of(law), 2**law.bits
    numbers = left.starts[:-1, None] + np.arange(width)
    assert len(np.unique(numbers)) == numbers.size == numbers.max() - numbers.min() + 1, (
        "no number twice, none left out"
    )
    by_slot = np.bincount((law.values[: law.decided] - numbers.min()) // width, minlength=len(left.starts) - 1)
    slots = by_slot[(left.starts[:-1] - numbers.min()) // width]
    assert (slots == left.whole[:-1]).all()
    among = left._left(numbers, np.arange(len(numbers))[:, None].repeat(width, 1))
    assert among.min() >= 0, "slots stay under the distribution"
    assert (among.max(1) + 1e-7 < left.bounds[:-1]).all(), "and what is left under its bounds"
    share = 1 - law.decided / 2**16
    got = slots[:, None] / (2**16 * width) + share * among / among.sum()
    wanted = np.exp(-((numbers / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    assert np.abs(got - wanted).sum() / 2 < 1e-12
    assert among.sum() / width / 2**16 == pytest.approx(left.scale * share, rel=1e-9), "so many tries are good"
    assert np.bincount(left.block, minlength=len(left.bounds)).tolist() == left.bounds.tolist()


@pytest.mark.parametrize("sigma", [1025.0, 8192.0, 2.0**17, 2.0**17 + 1, 2.0**22, 2.0**33, 2.0**44.9])
def test_most_draws_of_any_width_are_one_look_up(sigma: float) -> None:
    law = wide_gaussian(sigma)
    assert law.values[0] == 0, "a source of zeros gives no noise"
    assert 0.96 < law.decided / 2**16 < 1
    assert left_of(law).bounds.sum() == 2**16
    low = np.bincount(draws(20_000, sigma) >> law.bits - 4 & 15, minlength=16)
    assert stats.chisquare(low).pvalue > 1e-3, "the low bits are no less random than others"


def pi() -> Decimal:
    """By Machin's formula, as precisely as Decimal is set to."""

    def arctan_of_one_over(n: int) -> Decimal:
        return sum((Decimal((-1) ** k) / ((2 * k + 1) * Decimal(n) ** (2 * k + 1)) for k in range(90)), Decimal(0))

    return 4 * (4 * arctan_of_one_over(5) - arctan_of_one_over(239))


@pytest.mark.parametrize(("offset", "below"), [(-1, True), (0, False), (1, False)])
def test_where_48_bits_do_not_decide_a_try_the_others_do(offset: int, below: bool) -> None:
    """A part of the bound that is what is left at a number, to the last of 176 bits, by a calculation of its own."""
    law = wide_gaussian(5000.0)
    left = left_of(law)
    for block, low in ((0, 3), (7, 63), (40, 11)):
        number = int(left.starts[block]) + low
        with localcontext() as exact:
            exact.prec = 100
            height = 2 ** (16 + law.bits) / (5000 * (2 * pi()).sqrt())
            among = height * (-((Decimal(number) / 5000) ** 2) / 2).exp() - int(left.whole[block])
            wanted = Decimal(left.scale) * among
            part = math.ceil(wanted * 2**176 / int(left.bounds[block])) + offset
        first = int(np.flatnonzero(left.block == block)[0]) | (part >> 128) << 16
        words = {"test/rest 0": [first, low], "test/rest 0 more": [part >> 64 & 2**64 - 1, part & 2**64 - 1]}

        def crafted(context: Context, purpose: str, about: NDArray[np.float64], count: int) -> NDArray[np.uint64]:
            return np.array(words[purpose], np.uint64)  # noqa: B023  # called before the loop goes on

        found = left._good(Wanted(crafted, COUNTED, "test", np.zeros(1)), 1, "/rest 0")
        assert found.tolist() == ([number] if below else [])


@pytest.mark.parametrize("sigma", [0.7, 2.0, 11.3])
def test_draws_pass_a_chi_square_test(sigma: float) -> None:
    assert far_from(draws(200_000, sigma), sigma) > 1e-3
    assert far_from(draws(200_000, sigma), 1.02 * sigma) < 1e-6, "the test would notice 2 %"


@pytest.mark.parametrize("variance", [0.5, 4.0, 130.0])
def test_skellam_draws_pass_a_chi_square_test_and_so_do_their_sums(variance: float) -> None:
    """The probabilities are e⁻ᵛ Iₙ(v); ten of a tenth of the variance add up to the same."""
    shares = [skellam(COUNTED, f"share {i}", np.zeros(100_000), variance=max(variance / 10, 0.25)) for i in range(10)]
    total = max(variance, 2.5)
    for found, v in (
        (skellam(COUNTED, "test", np.zeros(200_000), variance=variance), variance),
        (np.sum(shares, 0), total),
    ):
        reach = int(np.abs(found).max())
        p = special.ive(np.abs(np.arange(-reach, reach + 1)), v)
        seen = np.bincount(found + reach, minlength=len(p))
        common = p * len(found) >= 20
        observed, expected = [np.append(a[common], a[~common].sum()) for a in (seen, p / p.sum() * len(found))]
        kept = expected > 0
        expected = expected[kept] * observed[kept].sum() / expected[kept].sum()
        assert stats.chisquare(observed[kept], expected).pvalue > 1e-3


@pytest.mark.parametrize("variance", [0.0, 0.1, 2.0**21, math.nan])
def test_variances_that_cannot_be_are_refused(variance: float) -> None:
    with pytest.raises(ConfigurationError, match="variance"):
        skellam(COUNTED, "test", np.zeros(1), variance=variance)


def test_sums_of_ten_shares_are_a_discrete_gaussian() -> None:
    shares = sum((draws(100_000, 4.0, f"share {i}") for i in range(10)), np.zeros(100_000, np.int64))
    assert far_from(shares, 4.0 * math.sqrt(10)) > 1e-3


@pytest.mark.parametrize("sigma", [700.0, 3000.0, 2.0**20])
def test_large_draws_are_normal_and_independent(sigma: float) -> None:
    found = draws(100_000, sigma) / sigma
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.abs(found), np.sign(found))[0, 1]) < 0.015


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_where_the_first_bits_do_not_decide_the_others_do(offset: int) -> None:
    """A threshold hit to the last of 127 bits: one below it is still the smaller magnitude."""
    table = _gaussian(3.0).rest
    for magnitude, threshold in enumerate(table.thresholds[:8]):
        value = threshold + offset
        half, rest = value >> 96 << 1, (value & (2**96 - 1)) << 32
        words = {
            "test": [2**64 - 1],  # slots that stand for no number
            "test/rest": [half << 32 | half],
            "test/second": [rest >> 64, rest & (2**64 - 1)] * 2,
        }

        def crafted(context: Context, purpose: str, about: NDArray[np.float64], count: int) -> NDArray[np.uint64]:
            found = np.array(words[purpose], np.uint64)  # noqa: B023  # called before the loop goes on
            assert len(found) == count
            return found

        found = discrete_gaussian(COUNTED._replace(secret=crafted), "test", np.zeros(2), sigma=3.0)
        assert found.tolist() == [magnitude + (offset >= 0)] * 2


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.1, math.nan, math.inf, 2.0**50])
def test_deviations_that_cannot_be_are_refused(sigma: float) -> None:
    with pytest.raises(ConfigurationError, match="sigma"):
        draws(1, sigma)


# --- where words come from ----------------------------------------------------------------------------------


def test_the_default_is_the_operating_system_and_never_repeats() -> None:
    bare = Context(seed=11, round=3, client=-1)
    assert source(bare) is system
    one, other = (discrete_gaussian(bare, "test", np.zeros(50), sigma=100.0) for _ in range(2))
    assert (one != other).any()


def test_noise_known_from_the_seed_is_a_function_of_who_when_and_what_for() -> None:
    sent = [
        draws(50, 9.0).tolist(),
        draws(50, 9.0, "other").tolist(),
        *(
            discrete_gaussian(COUNTED._replace(**change), "test", np.zeros(50), sigma=9.0).tolist()
            for change in ({"seed": 12}, {"round": 4}, {"client": 0}, {"channel": "buffers"})
        ),
    ]
    assert sent[0] == draws(50, 9.0).tolist()
    assert len({tuple(row) for row in sent}) == len(sent)


def test_a_keyed_source_repeats_itself_only_for_the_very_same() -> None:
    """Another sum in the same round never gets the same noise, which a subtraction would lay bare."""
    about, context = np.arange(6.0), Context(seed=0, round=1, client=2)
    draw, another = keyed(b"a" * 32), keyed(b"b" * 32)
    first = draw(context, "sum", about, 4).tolist()
    assert draw(context._replace(seed=99), "sum", about.copy(), 4).tolist() == first, "the public seed does not enter"
    others = [
        another(context, "sum", about, 4),
        draw(context._replace(round=2), "sum", about, 4),
        draw(context._replace(client=3), "sum", about, 4),
        draw(context._replace(channel="buffers"), "sum", about, 4),
        draw(context, "bit", about, 4),
        draw(context, "sum", about + 2.0**-40, 4),
        draw(context, "sum", about.astype(np.float32), 4),
        draw(context, "sum", about[:-1], 4),
    ]
    assert all(other.tolist() != first for other in others)
    assert draw(context, "sum", about, 9).tolist()[:4] == first


def test_a_key_is_long_and_never_shown() -> None:
    with pytest.raises(ConfigurationError, match="32 secret bytes"):
        keyed(b"short")
    assert "aaaa" not in repr(keyed(b"a" * 32))
    assert pickle.loads(pickle.dumps(keyed(b"a" * 32))) == keyed(b"a" * 32)

"""What mechanisms promise about sums: the bound of one client, the noise, the planned divisor, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from scipy import stats

import foedus as fd
from foedus.core.aggregate import Aggregator, fold, lift, mean, nothing, unlift
from foedus.core.stage import chain, clip
from foedus.core.values import SERVER, Context, Message, Update
from foedus.errors import ConfigurationError, IncompatibleStages, NoGuarantee, SumOverflow, UpdateRefused
from foedus.privacy.events import Gaussian, LocalGaussian
from foedus.privacy.mechanisms import adaptive, central, grid, local, on_grid, update_noise
from foedus.privacy.noise import keyed, known_to_all_who_know_the_seed
from foedus.tree import Layout

LAYOUT = Layout(("p",), ((1,),), ("float32",))
TOLD = {"clip": np.array([0.7])}


def context(size: int, client: int = 0, seed: int = 5) -> Context:
    return Context(seed, 2, client, size=size, told=TOLD, secret=known_to_all_who_know_the_seed)


def messages(rule: Aggregator, vectors: list[NDArray[Any]], weights: list[float]) -> list[Message]:
    contexts = [context(len(v), i) for i, v in enumerate(vectors)]
    return [rule.admit(rule.encode(Update(v, w), c), c) for v, w, c in zip(vectors, weights, contexts, strict=True)]


def added(sent: list[Message]) -> NDArray[np.float64]:
    """The sum before noise."""
    total = fold(mean(weighted=False), [{n: a.copy() for n, a in m.items()} for m in sent])
    assert total is not None
    return np.asarray(unlift(lift(total)))


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[NDArray[Any]], list[float]]:
    """Updates of all magnitudes, many of them near the bound."""
    size, count = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vectors = rng.normal(size=(count, size)) * 10.0 ** rng.uniform(-12, 12, (count, 1))
    near = rng.random(count) < 0.4
    vectors[near] *= (rng.choice([0.5, 0.7, 1.0], (count, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True))[near]
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return list(vectors.astype(dtype)), list(rng.uniform(0.0, 300, count))


# --- the bound ----------------------------------------------------------------------------------------------

bounds = st.tuples(st.sampled_from([1e-3, 0.7, 1.0, 30.0]), st.sampled_from([0.05, 1.0, 20.0]))


@given(cohorts(), bounds, st.sampled_from([None, 100.0]))
def test_one_client_changes_a_central_sum_by_at_most_the_bound(
    cohort: tuple[list[NDArray[Any]], list[float]], bound: tuple[float, float], most: float | None
) -> None:
    """Exactly: in whole steps of the grid, with Python's integers."""
    norm, z = bound
    rule, step = central(clip=norm, noise_multiplier=z, cohort=10, most=most), grid(norm, z, len(cohort[0][0]))
    sent = messages(rule, *cohort)
    change = (added(sent) - (added(sent[1:]) if len(sent) > 1 else 0)) / step
    assert (change == np.rint(change)).all()
    assert sum(int(steps) ** 2 for steps in change) <= (norm / step) ** 2


@given(cohorts())
def test_one_client_changes_an_adaptive_sum_by_at_most_one_and_the_count_by_a_half(
    cohort: tuple[list[NDArray[Any]], list[float]],
) -> None:
    sent = messages(adaptive(noise_multiplier=1.0, cohort=40), *cohort)
    change = added(sent) - (added(sent[1:]) if len(sent) > 1 else 0)
    assert math.fsum(change[:-1] ** 2) <= 1
    inside = np.linalg.norm(cohort[0][0].astype(np.float64)) <= 0.7 * (1 - 1e-9)
    assert change[-1] == 0.5 or not inside
    assert abs(change[-1]) == 0.5


@given(cohorts(), st.sampled_from([0.1, 3.0]))
def test_what_a_client_sends_by_local_is_of_the_bound_before_its_noise(
    cohort: tuple[list[NDArray[Any]], list[float]], z: float
) -> None:
    """The same words give the same noise, so that it drops out of a difference."""
    vector = cohort[0][0]
    stage, step = local(clip=0.7, noise_multiplier=z), grid(0.7, z, len(vector))
    blank, sent = (
        stage.encode(Update(v, 3.0), context(len(v))).vector.astype(np.float64) for v in (0 * vector, vector)
    )
    steps = (sent - blank) / step
    assert (steps == np.rint(steps)).all()
    assert sum(int(n) ** 2 for n in steps) <= (0.7 / step) ** 2


@given(cohorts())
def test_what_is_within_the_bound_is_only_rounded(cohort: tuple[list[NDArray[Any]], list[float]]) -> None:
    for vector in cohort[0]:
        short = clip(0.5).encode(Update(vector, 1.0), context(1)).vector.astype(np.float64)
        step = grid(0.7, 1.0, len(vector))
        assert np.abs(on_grid(short, 0.7, step) * step - short).max() <= step / 2


@pytest.mark.parametrize("size", [1, 1000, 200_000])
def test_a_clipped_update_keeps_its_direction_and_nearly_its_length(size: int) -> None:
    vector = np.random.default_rng(0).normal(size=size)
    step = grid(1.0, 1.0, size)
    found = on_grid(vector / np.linalg.norm(vector), 1.0, step) * step
    assert 0.995 < np.linalg.norm(found) <= 1
    assert found @ vector / np.linalg.norm(found) / np.linalg.norm(vector) > 0.9999
    assert abs((found - vector / np.linalg.norm(vector)).mean()) < step / 10, "rounding pulls nowhere"


# --- the noise and the divisor ------------------------------------------------------------------------------


def decoded(rule: Aggregator, message: Message, size: int, seed: int = 5) -> NDArray[np.float64]:
    state = {"clip": TOLD["clip"]} if rule.tell else {}
    return np.asarray(rule.decode(state, message, context(size, SERVER, seed))[0])


@pytest.mark.parametrize(
    ("rule", "deviation"),
    [
        (central(clip=0.7, noise_multiplier=1.3, cohort=20), 0.7 * 1.3 / 20),
        (central(clip=0.7, noise_multiplier=1.3, cohort=20, most=50), 0.7 * 1.3 / 20),
        (adaptive(noise_multiplier=1.0, cohort=100), 0.7 * 1.00504 / 100),
        (chain(local(clip=0.7, noise_multiplier=3.0), mean()), 0.7 * 3.0 / math.sqrt(2)),
        (chain(fd.rotate(), central(clip=0.7, noise_multiplier=1.3, cohort=20)), 0.7 * 1.3 / 20),
    ],
    ids=lambda value: value.label if isinstance(value, Aggregator) else "",
)
def test_every_entry_gets_normal_noise_of_the_promised_size(rule: Aggregator, deviation: float) -> None:
    size = 20_000
    rng = np.random.default_rng(1)
    vectors = [v / np.linalg.norm(v) * 0.5 for v in rng.normal(size=(2, size))]
    total = fold(rule, messages(rule, vectors, [50.0, 50.0]))
    assert total is not None
    divisor = 2 if "local" in rule.label else 100 if rule.tell else 20
    noise = (decoded(rule, total, size) - np.sum(vectors, 0) / divisor) / deviation
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert np.std(noise) == pytest.approx(1, abs=0.02)


def test_the_divisor_is_the_planned_cohort_however_many_came() -> None:
    rule, vectors = central(clip=1.0, noise_multiplier=0.5, cohort=8), list(np.eye(5))
    noise = decoded(rule, nothing(rule, context(5)), 5)
    for count in (1, 3, 5):
        total = fold(rule, messages(rule, vectors[:count], [1.0] * count))
        assert total is not None
        found = (decoded(rule, total, 5) - noise) * 8
        np.testing.assert_allclose(found, np.sum(vectors[:count], 0), atol=2 * grid(1.0, 0.5, 5))


def test_weights_count_at_most_one_and_never_more_than_the_bound() -> None:
    rule = central(clip=1.0, noise_multiplier=0.001, cohort=1, most=100)
    sent = [added(messages(rule, [np.array([0.5])], [w]))[0] for w in (0.0, 25.0, 100.0, 1e9)]
    np.testing.assert_allclose(sent, [0, 0.125, 0.5, 0.5], atol=1e-5)
    plain = central(clip=1.0, noise_multiplier=0.001, cohort=1)
    assert len({added(messages(plain, [np.array([0.5])], [w]))[0] for w in (1.0, 25.0, 1e9)}) == 1


def test_nobody_gets_noise_too() -> None:
    for rule in (central(clip=1.0, noise_multiplier=1.0, cohort=4), adaptive(noise_multiplier=1.0, cohort=40)):
        one, other = (decoded(rule, nothing(rule, context(6)), 6, seed) for seed in (1, 2))
        assert one.shape == (6,)
        assert (one != other).any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "rule",
    [
        central(clip=1.0, noise_multiplier=1.0, cohort=4, most=10),
        central(clip=1.0, noise_multiplier=1.0, cohort=4),
        central(clip=1e-4, noise_multiplier=0.5, cohort=4),  # a finer grid than the first limb
        central(clip=1e14, noise_multiplier=1.0, cohort=4),
        adaptive(noise_multiplier=1.0, cohort=40),
        chain(local(clip=1.0, noise_multiplier=1.0), mean()),
        chain(fd.rotate(), central(clip=1.0, noise_multiplier=1.0, cohort=4)),
    ],
    ids=lambda value: value.label if isinstance(value, Aggregator) else "",
)
def test_shortcuts_are_the_same_bits(rule: Aggregator, dtype: str) -> None:
    assert rule.shortcut is not None
    vectors = (np.random.default_rng(0).normal(size=(6, 9)) * [[1], [1], [9], [0.01], [0], [1e-6]]).astype(dtype)
    updates = [Update(v, w) for v, w in zip(vectors, range(6), strict=True)]
    contexts = [context(9, i) for i in range(6)]
    slow = fold(rule, [lift(rule.encode(u, c)) for u, c in zip(updates, contexts, strict=True)])
    fast = rule.shortcut(updates, contexts)
    assert slow is not None
    assert slow.keys() == fast.keys()
    for name in slow:
        assert slow[name].dtype == fast[name].dtype
        assert (slow[name] == fast[name]).all()


def test_resent_local_updates_are_the_same_bytes_and_others_are_not() -> None:
    stage = local(clip=1.0, noise_multiplier=2.0)
    own = context(4)._replace(secret=keyed(b"k" * 32))
    vector = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    once, again, other = (stage.encode(Update(v, 1.0), own).vector for v in (vector, vector.copy(), vector + 0.1))
    assert once.tobytes() == again.tobytes()
    assert np.abs(other - once - 0.1).max() > 0.1, "its noise is another"
    fresh = [stage.encode(Update(vector, 1.0), own._replace(secret=None)).vector.tobytes() for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_numbers_of_examples_stay_with_the_client_under_local_noise() -> None:
    rule = chain(local(clip=1.0, noise_multiplier=1.0), mean())
    a, b = (rule.encode(Update(np.ones(3), w), context(3)) for w in (1.0, 500.0))
    assert all((a[name] == b[name]).all() for name in a)


# --- the bound that follows ---------------------------------------------------------------------------------


def test_the_share_for_updates_is_the_published_figure() -> None:
    assert update_noise(1.0, 100 / 20) == pytest.approx(1.00504, abs=5e-6)
    assert adaptive(noise_multiplier=1.0, cohort=100).event == Gaussian(1.0)
    with pytest.raises(NoGuarantee, match="leaves nothing"):
        adaptive(noise_multiplier=1.0, cohort=10, bit_noise=0.5)
    assert adaptive(noise_multiplier=1.0, cohort=10).event == Gaussian(1.0)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.2, 0.8))
def test_the_bound_moves_as_in_the_paper(norms: list[float], quantile: float) -> None:
    """C ← C · exp(−0.2 (b̄ − γ)), b̄ the noisy share over the planned cohort of those within the bound."""
    rule, cohort = adaptive(noise_multiplier=0.1, cohort=50, start=0.7, quantile=quantile), 50
    sent = messages(rule, [np.array([n]) for n in norms], [1.0] * len(norms))
    total = fold(rule, sent)
    assert total is not None
    state = rule.init(LAYOUT)
    _, after = rule.decode(state, total, context(1, SERVER))
    _, blank = rule.decode(state, nothing(rule, context(1)), context(1, SERVER))
    within = sum((n <= 0.7) - 0.5 for n in norms)
    ratio = float(after["clip"][0] / blank["clip"][0])
    assert ratio == pytest.approx(math.exp(-0.2 * within / cohort), rel=1e-9), "the same noise on both"
    assert float(blank["clip"][0]) / 0.7 == pytest.approx(math.exp(-0.2 * (0.5 - quantile)), rel=0.2)
    assert rule.tell is not None
    assert rule.tell(after) == {"clip": after["clip"]}


@pytest.mark.slow  # sixty rounds of a hundred clients
@pytest.mark.parametrize("quantile", [0.5, 0.75])
def test_the_bound_finds_the_quantile(quantile: float) -> None:
    rng, count = np.random.default_rng(0), 100
    rule = adaptive(noise_multiplier=1.0, cohort=count, start=0.03, quantile=quantile, rate=0.4)
    state, seen = rule.init(LAYOUT), []
    for turn in range(60):
        norms = np.exp(rng.normal(size=count))  # of median 1
        here = [context(1, i)._replace(round=turn, told=state) for i in range(count)]
        total = fold(rule, [rule.encode(Update(np.array([n]), 1.0), c) for n, c in zip(norms, here, strict=True)])
        assert total is not None
        state = rule.decode(state, total, context(1, SERVER)._replace(round=turn))[1]
        seen.append(float(state["clip"][0]))
    assert np.mean(seen[-30:]) == pytest.approx(float(np.exp(stats.norm.ppf(quantile))), rel=0.15)


def test_a_client_that_was_told_no_bound_sends_nothing() -> None:
    rule = adaptive(noise_multiplier=1.0, cohort=100)
    for told in ({}, {"clip": np.array([0.0])}, {"clip": np.array([np.nan])}, {"clip": np.ones(2)}):
        with pytest.raises(NoGuarantee, match="told no bound"):
            rule.encode(Update(np.ones(2), 1.0), context(2)._replace(told=told))


# --- what never gets in -------------------------------------------------------------------------------------

RULES = [central(clip=1.0, noise_multiplier=1.0, cohort=4), adaptive(noise_multiplier=1.0, cohort=40)]


@pytest.mark.parametrize("rule", [*RULES, chain(local(clip=1.0, noise_multiplier=1.0), mean())], ids=lambda r: r.label)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_gets_noise(rule: Aggregator, value: float) -> None:
    with pytest.raises(SumOverflow, match="not finite"):
        rule.encode(Update(np.array([1.0, value]), 2.0), context(2))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v * 1.5, "longer than the bound"),
        (lambda v: v + 1e-9, "not on the grid"),
        (lambda v: v * np.nan, "not finite"),
    ],
)
def test_messages_that_no_client_of_ours_sends_are_refused(rule: Aggregator, change: Any, told: str) -> None:
    message = rule.encode(Update(np.array([300.0, 400.0]), 2.0), context(2, client=7))
    rule.admit(message, context(2, client=7))
    forged = message["values"].copy()
    forged[:2] = change(forged[:2])
    with pytest.raises(UpdateRefused, match=f"client 7 {told}|client 7 .* {told}"):
        rule.admit(message | {"values": forged}, context(2, client=7))


def test_a_forged_bit_is_refused() -> None:
    rule = RULES[1]
    message = rule.encode(Update(np.array([0.1, 0.2]), 2.0), context(2))
    for bit in (100.0, 0.0, np.nan):
        forged = np.append(message["values"][:-1], bit)
        with pytest.raises(UpdateRefused, match="bit of client 0"):
            rule.admit(message | {"values": forged}, context(2))


# --- combinations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (fd.mean(), "weights by numbers of examples"),
        (fd.median(), "compares single updates"),
        (fd.krum(1), "compares single updates"),
        (fd.chain(fd.rotate(), fd.mean(weighted=False)), "Stages go before it"),
        (fd.clip(1.0), "is no mean"),
    ],
)
def test_central_noise_on_anything_but_a_plain_mean_is_refused(rule: Any, told: str) -> None:
    with pytest.raises(IncompatibleStages, match=told):
        central(rule, clip=1.0, noise_multiplier=1.0, cohort=10)
    assert central(fd.mean(weighted=False), clip=1.0, noise_multiplier=1.0, cohort=10).event == Gaussian(1.0)


def test_noise_after_averaging_is_not_called_local() -> None:
    with pytest.raises(IncompatibleStages, match="ends with an aggregator"):
        chain(mean(), local(clip=1.0, noise_multiplier=1.0))


def test_chains_that_would_break_a_bound_are_refused() -> None:
    rule, stage = central(clip=1.0, noise_multiplier=1.0, cohort=10), local(clip=1.0, noise_multiplier=1.0)
    with pytest.raises(IncompatibleStages, match="both add noise"):
        chain(stage, rule)
    with pytest.raises(IncompatibleStages, match="makes codes that are undone only after the adding"):
        chain(fd.quantise(8, scale=1.0), rule)
    with pytest.raises(IncompatibleStages, match="would keep that noise"):
        fd.error_feedback(rule)
    with pytest.raises(IncompatibleStages, match=r"hierarchical\(..., rounds=1\)"):
        fd.fedavg(fd.local_sgd(0.1), aggregator=rule, timing=fd.hierarchical(2, rounds=3))


@pytest.mark.parametrize("stages", [[fd.quantise(16)], [fd.rotate(), fd.eden(8)], [fd.top_k(0.5), fd.qsgd(7)]])
def test_stages_that_are_undone_message_by_message_keep_the_bound(stages: list[Any]) -> None:
    """The server clips again what it decoded, which may have become longer."""
    rule, size = chain(*stages, central(clip=1.0, noise_multiplier=1.0, cohort=10)), 32
    assert rule.event == Gaussian(1.0)
    for vector in np.random.default_rng(0).normal(size=(20, size)).astype(np.float32):
        (sent,) = messages(rule, [vector], [1.0])
        assert math.fsum(added([sent]) ** 2) <= 1


def test_any_rule_may_follow_local_noise() -> None:
    for rule in (fd.median(), fd.mean(), fd.trimmed_mean(0.1)):
        assert chain(fd.rotate(), local(clip=1.0, noise_multiplier=2.0), rule).event == LocalGaussian(2.0)
    assert chain(fd.clip(1.0), fd.mean()).event is None


@pytest.mark.parametrize(
    "wrong", [{"clip": 0.0}, {"clip": math.nan}, {"noise_multiplier": 0}, {"noise_multiplier": -1.0}, {"cohort": 0}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    right = {"clip": 1.0, "noise_multiplier": 1.0, "cohort": 100}
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        central(**(right | wrong))  # type: ignore[arg-type]


def test_a_bound_finer_than_exact_sums_is_refused_when_built() -> None:
    for make in (
        lambda: central(clip=1e-15, noise_multiplier=0.1, cohort=1),
        lambda: local(clip=1e-20, noise_multiplier=1),
    ):
        with pytest.raises(NoGuarantee, match="finer than exact sums"):
            make()


def test_the_order_of_merging_changes_no_bit() -> None:
    rule = RULES[0]
    sent = messages(rule, list(np.random.default_rng(0).normal(size=(4, 3))), [1.0] * 4)
    found = set()
    for order in itertools.permutations(range(4)):
        total = fold(rule, [{n: a.copy() for n, a in sent[i].items()} for i in order])
        assert total is not None
        found.add(decoded(rule, total, 3).tobytes())
    assert len(found) == 1

"""Attacks do what their papers say, and reach as far as they claim."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given
from numpy.typing import NDArray

from foedus.core.aggregate import mean
from foedus.core.attacks import (
    Adversary,
    Attack,
    Scene,
    adaptive,
    against_deviation,
    against_mean,
    against_sign,
    aggregated,
    alie,
    colluders,
    corrupted,
    garbage,
    inner_product,
    min_max,
    min_sum,
    model_replacement,
    most_deviations,
    not_finite,
    scaled_noise,
    sign_flip,
)
from foedus.core.robust import centred_clipping, dnc, fltrust, krum, median, multi_krum, trimmed_mean
from foedus.core.values import SERVER, Context, Update
from foedus.errors import ConfigurationError
from foedus.tree import Layout

Matrix = NDArray[Any]
DIRECTIONS = [against_deviation, against_mean, against_sign]
ATTACKS = [
    garbage(), not_finite(), sign_flip(2.0), scaled_noise(3.0), model_replacement(4.0), colluders(garbage(1.0)), alie(),
    alie(1.5, omniscient=False), inner_product(0.5), min_max(), min_sum(against_sign), adaptive(median(), steps=8),
]  # fmt: skip
every = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.label)
CONTEXT = Context(seed=0, round=3, client=SERVER, layout=Layout(("p",), ((6,),), ("float32",)))


def scene(seed: int = 0, *, honest: int = 8, attackers: int = 3, size: int = 6) -> Scene:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(honest + attackers, size)) * rng.uniform(0.1, 2, size) + 1
    return Scene(rows[:honest], rows[honest:], CONTEXT, rng)


scenes = st.integers(0, 2**32).map(scene)


@every
def test_an_attack_keeps_the_shape_and_changes_nothing_it_sees(attack: Attack) -> None:
    seen = scene()
    honest, own = seen.honest.copy(), seen.own.copy()
    found = attack.craft(seen)
    assert found.shape == own.shape
    assert (seen.honest == honest).all()
    assert (seen.own == own).all()
    assert (found != own).any()


@every
def test_attacks_repeat_in_the_same_round_and_only_there(attack: Attack) -> None:
    updates = {c: Update(np.linspace(-1, c, 6, dtype="f4"), 3.0) for c in range(9)}
    adversary = Adversary(clients=[1, 5, 40], attack=attack)
    one, two = (corrupted(adversary, updates, CONTEXT) for _ in range(2))
    assert all(one[c].vector.tobytes() == two[c].vector.tobytes() for c in updates)
    assert {c for c in updates if one[c].vector.tobytes() != updates[c].vector.tobytes()} <= {1, 5}
    assert all(u.vector.dtype == np.float32 and u.weight == 3.0 for u in one.values())
    if "garbage" in attack.label:
        later = corrupted(adversary, updates, CONTEXT._replace(round=4))
        assert later[1].vector.tobytes() != one[1].vector.tobytes()


def test_simple_ones() -> None:
    seen = scene()
    np.testing.assert_array_equal(sign_flip(2.0).craft(seen), -2 * seen.own)
    np.testing.assert_array_equal(model_replacement(5.0).craft(seen), 5 * seen.own)
    np.testing.assert_allclose(inner_product(0.3).craft(seen), np.tile(-0.3 * seen.honest.mean(0), (3, 1)))
    assert np.isnan(not_finite().craft(seen)).all()
    big = scene(size=20_000)
    noise = scaled_noise(2.0).craft(big) - big.own
    ratio = np.linalg.norm(noise, axis=1) / np.linalg.norm(big.own, axis=1)
    np.testing.assert_allclose(ratio, 2.0, rtol=0.05)
    assert garbage(50.0).craft(big).std() == pytest.approx(50, rel=0.02)


def test_colluders_send_the_same_and_others_do_not() -> None:
    assert len(np.unique(colluders(garbage()).craft(scene()), axis=0)) == 1
    assert len(np.unique(garbage().craft(scene()), axis=0)) == 3


def test_alie_stays_within_its_deviations_and_takes_the_papers_number_of_them() -> None:
    seen = scene()
    found = alie(1.5).craft(seen)[0]
    np.testing.assert_allclose(found, seen.honest.mean(0) - 1.5 * seen.honest.std(0))
    assert most_deviations(50, 24) == pytest.approx(NormalDist().inv_cdf((50 - 24 - 2) / (50 - 24)))  # section 4.1
    z = most_deviations(11, 3)
    np.testing.assert_allclose(alie().craft(seen)[0], seen.honest.mean(0) - z * seen.honest.std(0))
    blind = alie(1.5, omniscient=False).craft(seen._replace(honest=seen.honest[:0]))[0]
    np.testing.assert_allclose(blind, seen.own.mean(0) - 1.5 * seen.own.std(0))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda d: d.__name__)
@given(scenes)
def test_min_max_is_as_far_from_an_honest_update_as_two_honest_ones_are(direction: Any, seen: Scene) -> None:
    found = min_max(direction).craft(seen)[0]
    largest = max(float(np.linalg.norm(a - b)) for a in seen.honest for b in seen.honest)
    away = np.linalg.norm(seen.honest - found, axis=1)
    assert away.max() == pytest.approx(largest, rel=1e-9)
    moved = found - seen.honest.mean(0)
    assert moved @ direction(seen.honest) > 0
    assert np.linalg.norm(seen.honest - (found + 1e-6 * moved), axis=1).max() > largest  # no farther is possible


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda d: d.__name__)
@given(scenes)
def test_min_sum_has_the_largest_sum_of_squares_of_an_honest_update(direction: Any, seen: Scene) -> None:
    found = min_sum(direction).craft(seen)[0]
    sums = [sum(float(((a - b) ** 2).sum()) for b in seen.honest) for a in seen.honest]
    assert float(((seen.honest - found) ** 2).sum()) == pytest.approx(max(sums), rel=1e-9)


def test_honest_updates_that_agree_leave_no_room() -> None:
    seen = scene()._replace(honest=np.ones((5, 6)))
    for attack in (min_max(), min_sum(), min_max(against_mean), alie(1.0)):
        np.testing.assert_allclose(attack.craft(seen), np.ones((3, 6)), atol=1e-6)


RULES = [
    mean(weighted=False),
    median(),
    trimmed_mean(0.2),
    krum(3),
    multi_krum(3),
    dnc(3),
    centred_clipping(1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)
@pytest.mark.parametrize("seed", range(4))
def test_an_adaptive_attack_gains_at_least_what_the_fixed_ones_gain(rule: Any, seed: int) -> None:
    """Along one direction, over scales: no worse than min-max and min-sum along it, up to the ladder's gaps."""
    seen = scene(seed)
    centre = seen.honest.mean(0)

    def gain(attack: Attack) -> float:
        found = aggregated(rule, [*seen.honest, *attack.craft(seen)], seen)
        assert found is not None
        return float(np.linalg.norm(found - centre))

    best = gain(adaptive(rule))
    for fixed in (min_max(), min_sum()):
        assert best >= 0.8 * gain(fixed)


def test_an_adaptive_attack_against_the_mean_is_as_loud_as_its_ladder_allows() -> None:
    seen = scene()
    found = adaptive(mean(weighted=False)).craft(seen)[0]
    assert np.linalg.norm(found - seen.honest.mean(0)) > 30 * np.linalg.norm(seen.honest.std(0))


def test_an_adaptive_attack_knows_who_the_trusted_client_is() -> None:
    updates = {c: Update(u.astype("f4"), 1.0) for c, u in zip((2, 4, 7, 9), scene(honest=4).honest, strict=True)}
    attack = adaptive(fltrust(trusted=7), against_mean)
    found = corrupted(Adversary(clients=[2], attack=attack), updates, CONTEXT)
    assert found[2].vector.tolist() != updates[2].vector.tolist()
    rule, messages = fltrust(trusted=7), []
    for c, u in found.items():
        messages.append(rule.admit(rule.encode(u, CONTEXT), CONTEXT._replace(client=c)))
    assert aggregated(rule, list(scene(honest=4).honest), scene()._replace(clients=(1, 2, 3, 4))) is None  # no 7


@given(scenes)
def test_one_is_enough_for_a_mean_and_a_third_is_not_for_a_median(seen: Scene) -> None:
    assume(np.abs(seen.honest).max() < 10)
    for rule, moved in ((mean(weighted=False), True), (median(), False)):
        found = aggregated(rule, [*seen.honest, *garbage(1e6).craft(seen)], seen)
        assert found is not None
        assert (np.abs(found).max() > 100) == moved


def test_nobody_attacks_before_their_round_or_outside_the_cohort() -> None:
    updates = {c: Update(np.ones(2, "f4"), 1.0) for c in range(3)}
    for adversary in (
        Adversary(clients=[1], attack=sign_flip(), since=4),
        Adversary(clients=[7], attack=sign_flip()),
    ):
        assert corrupted(adversary, updates, CONTEXT) == updates


def test_attackers_that_are_not_omniscient_are_shown_nobody_else() -> None:
    shown = []
    spy = Attack(lambda s: shown.append(s) or s.own, "spy()")  # type: ignore[func-returns-value]
    updates = {c: Update(np.full(2, float(c), "f4"), 1.0) for c in range(5)}
    corrupted(Adversary(clients=[4, 1], attack=spy), updates, CONTEXT)
    corrupted(Adversary(clients=[4, 1], attack=spy._replace(omniscient=True)), updates, CONTEXT)
    assert shown[0].honest.shape == (0, 2)
    assert shown[0].own[:, 0].tolist() == [1, 4]
    assert shown[1].honest[:, 0].tolist() == [0, 2, 3]
    assert shown[1].clients == (0, 2, 3, 1, 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Adversary(clients=[-1], attack=sign_flip()), lambda: Adversary(clients=[0], attack=sign_flip),  # type: ignore[arg-type]
        lambda: Adversary(clients=[0], attack=sign_flip(), since=0), lambda: sign_flip(0.0),
        lambda: alie(omniscient=False),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_when_written(build: Any) -> None:
    with pytest.raises(ConfigurationError):
        build()


def test_attackers_among_themselves_need_no_deviation() -> None:
    assert most_deviations(3, 3) == 0.0

"""Robust rules beside brute-force oracles, and what a minority of attackers can and cannot do to them."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]

from foedus.core.aggregate import Aggregator, fold, mean
from foedus.core.robust import (
    Collected,
    bulyan,
    centred_clipping,
    collect,
    dnc,
    fltrust,
    geometric_median,
    gram,
    krum,
    median,
    multi_krum,
    spectral,
    squared_distances,
    trimmed_mean,
)
from foedus.core.stage import chain, clip
from foedus.core.values import Context, State, Update
from foedus.errors import ConfigurationError, Reason, UpdateRefused
from foedus.tree import Layout

Matrix = NDArray[Any]
CONTEXT = Context(seed=5, round=4, client=-1)


def run(rule: Aggregator, rows: Matrix, *, weights: Any = None, state: State | None = None) -> Matrix:
    """The rule's update of rows [client, parameter]."""
    messages = []
    for client, row in enumerate(rows):
        context = CONTEXT._replace(client=client, size=len(row))
        update = Update(row, 1.0 if weights is None else float(weights[client]))
        messages.append(rule.admit(rule.encode(update, context), context))
    message = fold(rule, messages)
    assert message is not None
    size = rows.shape[1]
    state = rule.init(Layout(("p",), ((size,),), ("float32",))) if state is None else state
    return np.asarray(rule.decode(state, message, CONTEXT._replace(size=size))[0])


@st.composite
def matrices(draw: st.DrawFn, least: int = 1, most: int = 12) -> Matrix:
    """Updates [client, parameter] in general position, float64."""
    clients, size = draw(st.integers(least, most)), draw(st.integers(1, 6))
    return np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=(clients, size))


# --- oracles: plain loops -----------------------------------------------------------------------------------


@given(matrices())
def test_the_median_is_the_middle_value(rows: Matrix) -> None:
    for found, column in zip(run(median(), rows), rows.T, strict=True):
        ordered, n = sorted(column), len(column)
        assert found == pytest.approx((ordered[(n - 1) // 2] + ordered[n // 2]) / 2, rel=1e-15)


@given(matrices(), st.sampled_from([0.0, 0.1, 0.25, 0.29, 0.4, 0.49]))
def test_the_trimmed_mean_leaves_out_both_ends(rows: Matrix, share: float) -> None:
    out = int(round(share * 100) * len(rows)) // 100
    expected = [np.mean(sorted(column)[out : len(column) - out]) for column in rows.T]
    np.testing.assert_allclose(run(trimmed_mean(share), rows), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@given(matrices(least=2), st.integers(0, 2**20))
def test_the_geometric_median_has_the_least_summed_distance(rows: Matrix, seed: int) -> None:
    weights = np.random.default_rng(seed).integers(1, 9, len(rows))
    assume(weights.max() * 2 < weights.sum())  # otherwise one row is the answer, and nothing is smooth there

    def cost(point: Matrix) -> float:
        return float(weights @ np.sqrt(((rows - point) ** 2).sum(1)))

    found = cost(run(geometric_median(weighted=True), rows, weights=weights))
    starts = [rows.mean(0), *rows]
    best = min(minimize(cost, s, method="Nelder-Mead", options={"xatol": 1e-9, "maxiter": 400}).fun for s in starts)
    assert found <= best * (1 + 1e-5) + 1e-9


def plain_krum(rows: Matrix, attackers: int) -> list[tuple[float, float]]:
    """Score, and sum of all distances where scores are alike."""
    scores = []
    for i, row in enumerate(rows):
        away = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(rows) if j != i)
        scores.append((round(sum(away[: max(len(rows) - attackers - 2, 1)]), 11), sum(away)))
    return scores


def first(scores: list[tuple[float, float]]) -> int:
    return min(range(len(scores)), key=scores.__getitem__)


@given(matrices(least=9), st.integers(0, 3))
def test_krum_is_the_update_of_the_least_score(rows: Matrix, attackers: int) -> None:
    scores = plain_krum(rows, attackers)
    assert run(krum(attackers), rows).tolist() == rows[first(scores)].tolist()
    for keep in (1, 4, len(rows) - attackers):
        best = [rows[i] for i in sorted(range(len(rows)), key=scores.__getitem__)[:keep]]
        np.testing.assert_allclose(run(multi_krum(attackers, keep=keep), rows), np.mean(best, axis=0), atol=1e-12)
    np.testing.assert_array_equal(
        run(multi_krum(attackers), rows), run(multi_krum(attackers, keep=len(rows) - attackers), rows)
    )


@given(matrices(least=11), st.integers(0, 2))
def test_bulyan_is_krum_again_and_again_and_then_the_values_nearest_to_the_median(rows: Matrix, attackers: int) -> None:
    left = list(rows)
    picked = [left.pop(first(plain_krum(np.array(left), attackers))) for _ in range(len(rows) - 2 * attackers)]
    expected = []
    for column in np.array(picked).T:
        middle = np.median(column)
        expected.append(np.mean(sorted(column, key=lambda x: abs(x - middle))[: len(picked) - 2 * attackers]))
    np.testing.assert_allclose(run(bulyan(attackers), rows), expected, atol=1e-12)


@given(matrices(), st.floats(0.01, 5), st.integers(1, 4))
def test_centred_clipping_moves_its_centre_by_clipped_differences(rows: Matrix, radius: float, iterations: int) -> None:
    centre = np.linspace(-1, 1, rows.shape[1])
    found = run(centred_clipping(radius, iterations=iterations), rows, state={"centre": centre})
    for _ in range(iterations):
        lengths = [float(np.linalg.norm(x - centre)) for x in rows]
        clipped = [(x - centre) * (min(1, radius / n) if n else 1) for x, n in zip(rows, lengths, strict=True)]
        centre = centre + np.mean(clipped, axis=0)
    np.testing.assert_allclose(found, centre, atol=1e-12)


def test_centred_clipping_keeps_its_last_aggregate_as_the_next_centre() -> None:
    rule, layout = centred_clipping(1.0), Layout(("p",), ((2,),), ("float32",))
    message = rule.admit(rule.encode(Update(np.array([30.0, 40.0]), 1.0), CONTEXT), CONTEXT._replace(client=0))
    first, state = rule.decode(rule.init(layout), message, CONTEXT)
    second, state = rule.decode(state, message, CONTEXT)
    assert first.tolist() == pytest.approx([0.6, 0.8])
    assert second.tolist() == pytest.approx([1.2, 1.6])
    assert state["centre"].tolist() == second.tolist()


@given(matrices(least=2), st.data())
def test_fltrust_weighs_by_the_cosine_to_the_trusted_update(rows: Matrix, data: st.DataObject) -> None:
    trusted = data.draw(st.integers(0, len(rows) - 1))
    root, total, trust = rows[trusted], np.zeros(rows.shape[1]), 0.0
    for i, row in enumerate(rows):
        if i != trusted:
            cosine = max(0.0, float(row @ root) / float(np.linalg.norm(row) * np.linalg.norm(root)))
            total += cosine * row * np.linalg.norm(root) / np.linalg.norm(row)
            trust += cosine
    np.testing.assert_allclose(run(fltrust(trusted), rows), total / trust if trust else 0 * total, atol=1e-10)


@given(matrices(least=4), st.integers(0, 2))
def test_dnc_leaves_out_those_farthest_along_the_first_singular_vector(rows: Matrix, attackers: int) -> None:
    centred = rows - rows.mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    outliers = (centred @ direction) ** 2
    np.testing.assert_allclose(spectral(rows), outliers, atol=1e-9)
    good = sorted(range(len(rows)), key=lambda i: -outliers[i])[attackers:]
    np.testing.assert_allclose(run(dnc(attackers), rows), rows[sorted(good)].mean(0), atol=1e-9)


def test_dnc_looks_at_some_parameters_only_and_at_others_in_another_round() -> None:
    seen = set()
    rows = np.random.default_rng(0).normal(size=(9, 400))
    for round in range(1, 6):
        rule = dnc(3, dimensions=5)
        messages = [
            rule.admit(rule.encode(Update(r, 1.0), CONTEXT), CONTEXT._replace(client=i)) for i, r in enumerate(rows)
        ]
        seen.add(rule.decode({}, fold(rule, messages) or {}, CONTEXT._replace(round=round))[0].tobytes())
    assert len(seen) > 1


@given(matrices(least=2, most=8))
def test_distances_are_those_of_all_pairs(rows: Matrix) -> None:
    expected = [[float(((a - b) ** 2).sum()) for b in rows] for a in rows]
    np.testing.assert_allclose(squared_distances(rows), expected, atol=1e-12)
    np.testing.assert_allclose(gram(rows, np.zeros(rows.shape[1])), rows @ rows.T, atol=1e-12)


def test_honest_distances_do_not_drown_in_an_attackers_length() -> None:
    rows = np.array([[1e12, 1e12], [1.0, 2.0], [1.0, 2.5], [1.5, 2.0]])
    np.testing.assert_allclose(squared_distances(rows)[1, 2:], [0.25, 0.25], rtol=1e-12)


# --- laws ---------------------------------------------------------------------------------------------------

RULES = [
    median(),
    trimmed_mean(0.3),
    geometric_median(),
    krum(2),
    multi_krum(2),
    bulyan(1),
    centred_clipping(1.0),
    dnc(2),
]
every = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)


@every
@given(matrices(least=7), st.integers(0, 2**20))
def test_it_does_not_matter_which_client_has_which_number(rule: Aggregator, rows: Matrix, seed: int) -> None:
    assume(rows.shape[1] > 1)  # on a line, every point between the two middle ones is a geometric median
    again = rows[np.random.default_rng(seed).permutation(len(rows))]
    np.testing.assert_allclose(run(rule, rows), run(rule, again), atol=1e-8)


@pytest.mark.parametrize("rule", [r for r in RULES if "centred" not in r.label], ids=lambda r: r.label)
@given(matrices(least=7), st.floats(-4, 4))
def test_moving_all_updates_moves_the_result(rule: Aggregator, rows: Matrix, by: float) -> None:
    assume(rows.shape[1] > 1)
    np.testing.assert_allclose(run(rule, rows + by), run(rule, rows) + by, atol=1e-7)


@every
def test_float32_rows_of_many_blocks_give_what_float64_gives(rule: Aggregator) -> None:
    rows = np.random.default_rng(0).normal(size=(101, 20_001)).astype("f4")
    np.testing.assert_allclose(run(rule, rows), run(rule, rows.astype("f8")), atol=1e-5)


# --- attackers ----------------------------------------------------------------------------------------------

lies = st.sampled_from([1e-3, 1.0, 30.0, 1e6, 1e30, 1e100])


@st.composite
def attacked(draw: st.DrawFn, share: float) -> tuple[Matrix, Matrix]:
    """Honest rows and attackers' rows, these of any size and direction, at most so many."""
    clients = draw(st.integers(7, 16))
    bad = draw(st.integers(0, int(np.ceil(share * clients)) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    honest = rng.normal(size=(clients - bad, 4)) + 3
    direction = rng.normal(size=4) if draw(st.booleans()) else rng.normal(size=(bad, 4))
    return honest, np.broadcast_to(draw(lies) * direction, (bad, 4)).astype("f8")


def within(found: Matrix, honest: Matrix) -> bool:
    slack = 1e-9
    return bool((found >= honest.min(0) - slack).all() and (found <= honest.max(0) + slack).all())


@given(attacked(0.5))
def test_a_minority_cannot_move_the_median_out_of_the_honest_range(rows: tuple[Matrix, Matrix]) -> None:
    assert within(run(median(), np.concatenate(rows)), rows[0])


@given(attacked(0.5))
def test_as_many_as_are_trimmed_cannot_move_the_trimmed_mean_out(rows: tuple[Matrix, Matrix]) -> None:
    every, share = np.concatenate(rows), (len(rows[1]) + 0.01) / sum(map(len, rows))
    assume(share < 0.5)
    assert within(run(trimmed_mean(share), every), rows[0])


@given(attacked(0.25))
def test_bulyan_stays_in_the_honest_range(rows: tuple[Matrix, Matrix]) -> None:
    attackers = len(rows[1])
    assume(len(rows[0]) >= 3 * attackers + 3)
    assert within(run(bulyan(attackers), np.concatenate(rows)), rows[0])


@given(attacked(0.5))
def test_a_minority_moves_the_geometric_median_by_a_bounded_distance(rows: tuple[Matrix, Matrix]) -> None:
    """Pillutla et al. 2022, after Lopuhaä & Rousseeuw 1991: within 2n / (n − 2f) honest radii of any point inside."""
    honest, bad = rows
    centre = honest.mean(0)
    radius = np.linalg.norm(honest - centre, axis=1).max()
    total = len(honest) + len(bad)
    found = run(geometric_median(), np.concatenate(rows))
    assert np.linalg.norm(found - centre) <= 2 * total / (total - 2 * len(bad)) * radius * (1 + 1e-6)


@given(attacked(0.3))
def test_krum_never_picks_who_is_far_from_everybody(rows: tuple[Matrix, Matrix]) -> None:
    honest, bad = rows
    assume(len(honest) >= len(bad) + 3)
    found = run(krum(len(bad)), np.concatenate(rows))
    spread = np.sqrt(squared_distances(honest).max() * (len(honest) + len(bad)))
    assert np.linalg.norm(found - honest, axis=1).min() <= spread


@given(attacked(0.99))
def test_clipping_bounds_what_attackers_add_however_many(rows: tuple[Matrix, Matrix]) -> None:
    """Centred clipping moves at most its radius; a clipped mean is at most the norm."""
    assert np.linalg.norm(run(centred_clipping(0.5), np.concatenate(rows))) <= 0.5 + 1e-12
    if np.abs(rows[1]).max(initial=0.0) < 1e30:
        assert np.linalg.norm(run(chain(clip(0.5), mean(weighted=False)), np.concatenate(rows))) <= 0.5 + 1e-6


@given(attacked(0.99))
def test_no_number_of_attackers_turns_fltrust_around(rows: tuple[Matrix, Matrix]) -> None:
    """Client 0 is the server's: the result never points away from it, and is no longer."""
    found, root = run(fltrust(0), np.concatenate(rows)), rows[0][0]
    assert found @ root >= -1e-9
    assert np.linalg.norm(found) <= np.linalg.norm(root) * (1 + 1e-9)


def test_one_attacker_does_with_the_mean_as_it_likes() -> None:
    rows = np.concatenate([np.ones((9, 2)), [[-1e6, 0.0]]])
    assert run(mean(), rows)[0] < -9e4
    for rule in (median(), trimmed_mean(0.1), geometric_median(), krum(1), bulyan(1), dnc(1)):
        np.testing.assert_allclose(run(rule, rows), [1, 1], atol=1e-5)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_client_that_is_counted_twice_is_refused_wherever_it_is_noticed() -> None:
    rule = median()
    a, b, again = (
        rule.admit(rule.encode(Update(np.ones(2), 1.0), CONTEXT), CONTEXT._replace(client=c)) for c in (3, 4, 3)
    )
    merged = rule.merge(dict(a), b)
    with pytest.raises(UpdateRefused, match="client 3 is counted already") as caught:
        rule.merge(merged, again)
    assert caught.value.reason is Reason.REPLAY
    assert caught.value.client == 3
    assert merged.keys() == a.keys() | b.keys()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_what_is_not_finite_is_not_admitted(value: float) -> None:
    context = CONTEXT._replace(client=2)
    for rule in (median(), chain(clip(1.0), median())):
        message = median().encode(Update(np.array([1.0, value]), 1.0), context)
        with pytest.raises(UpdateRefused, match="client 2 has values that are not finite") as caught:
            rule.admit(message, context._replace(size=2))
        assert caught.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("weight", [np.nan, np.inf, 0.0, -1.0])
def test_a_weight_that_cannot_be_is_not_admitted(weight: float) -> None:
    rule = geometric_median(weighted=True)
    with pytest.raises(UpdateRefused, match="client 4 claims the weight") as caught:
        rule.admit(rule.encode(Update(np.ones(2), weight), CONTEXT), CONTEXT._replace(client=4))
    assert caught.value.reason is Reason.WEIGHT


def test_labels_say_all_that_is_not_usual() -> None:
    """A resumed run is compared by them."""
    assert dnc(2, dimensions=5, factor=1.5).label == "dnc(attackers=2, dimensions=5, factor=1.5)"
    assert geometric_median(weighted=True, smoothing=0.1).label == "geometric_median(weighted=True, smoothing=0.1)"
    assert multi_krum(2, keep=3).label == "multi_krum(attackers=2, keep=3)"


def test_another_length_is_not_admitted() -> None:
    context = CONTEXT._replace(client=2, size=3)
    with pytest.raises(UpdateRefused, match=r"shape \(2,\), and the model has 3") as caught:
        median().admit(median().encode(Update(np.ones(2), 1.0), context), context)
    assert caught.value.reason is Reason.SHAPE


@pytest.mark.parametrize(
    ("rule", "clients", "told"),
    [
        (
            krum(3),
            8,
            r"krum\(attackers=3\) needs at least 9 updates \(2 · 3 \+ 3\), and round 4 brought 8: write attackers=2",
        ),
        (multi_krum(1), 4, "at least 5 updates"),
        (
            bulyan(4),
            18,
            r"at least 19 updates \(4 · 4 \+ 3\), and round 4 brought 18: write attackers=3, or a larger",
        ),
        (krum(0), 2, "brought 2: a larger cohort"),
        (dnc(5), 5, "at least 6"),
    ],
)
def test_too_few_updates_are_told_what_to_write(rule: Aggregator, clients: int, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        run(rule, np.random.default_rng(0).normal(size=(clients, 3)))


def test_fltrust_without_its_client_says_how_to_have_it() -> None:
    with pytest.raises(ConfigurationError, match=r"foedus\.always\(\[7\], \.\.\.\)"):
        run(fltrust(7), np.ones((3, 2)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: trimmed_mean(0.5), lambda: krum(-1), lambda: bulyan(1.5), lambda: centred_clipping(0.0),  # type: ignore[arg-type]
        lambda: dnc(1, iterations=0), lambda: fltrust(-2), lambda: multi_krum(1, keep=0),
        lambda: geometric_median(smoothing=0.0),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_when_written(build: Any) -> None:
    with pytest.raises(ConfigurationError):
        build()


def test_a_rule_of_ones_own_sees_clients_weights_and_state() -> None:
    def heaviest(c: Collected) -> Matrix:
        assert c.clients.tolist() == [0, 1, 2]
        return c.rows[int(np.argmax(c.weights))]

    assert run(collect(heaviest, "heaviest()"), np.eye(3), weights=[1, 5, 2]).tolist() == [0, 1, 0]


def test_collecting_changes_no_message_and_copies_no_row() -> None:
    rule, rows = median(), np.ones((3, 5))
    seen = []
    spy = collect(lambda c: seen.append(c.rows) or c.rows[0], "spy()")  # type: ignore[func-returns-value]
    run(spy, rows)
    assert all(np.shares_memory(row, rows) for row in seen[0])
    assert not rule.additive


def test_rules_see_all_pairs_alike() -> None:
    """Krum over every labelling of five clients picks the same update."""
    rows = np.random.default_rng(1).normal(size=(5, 3))
    found = {tuple(run(krum(1), rows[list(order)])) for order in itertools.permutations(range(5))}
    assert len(found) == 1


@pytest.mark.parametrize("rule", [krum(4), multi_krum(4), bulyan(4), dnc(4)], ids=lambda r: r.label)
def test_refused_updates_count_as_attackers_who_are_out_already(rule: Aggregator) -> None:
    """Four of nineteen send NaN and are refused: the round goes on, and still bears the lies that are left."""
    honest = np.random.default_rng(0).normal(size=(15, 3))
    messages = {
        i: rule.admit(rule.encode(Update(r, 1.0), CONTEXT), CONTEXT._replace(client=i)) for i, r in enumerate(honest)
    }
    whole = fold(rule, [dict(m) for m in messages.values()])
    assert whole is not None
    assert within(np.asarray(rule.decode({}, whole, CONTEXT._replace(refused=4))[0]), honest)
    few = fold(rule, [dict(messages[i]) for i in range(3)])
    assert few is not None
    with pytest.raises(ConfigurationError, match="at least"):
        rule.decode({}, few, CONTEXT._replace(refused=0 if "dnc" in rule.label else 3))

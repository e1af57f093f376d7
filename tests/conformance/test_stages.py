"""The conformance suite of stages: a new member is one line in the list and inherits all of it.

A member says what the server should find of an update that went through the stage alone: for a stage that only
changes how updates travel (scaling, rotating, quantising) the update itself, within its error; for one that changes
them on purpose (clipping) what is left of it, worked out here by other means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import cloudpickle
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from foedus.core.aggregate import fold, mean
from foedus.core.quantise import drive, eden, qsgd, quantise
from foedus.core.rotation import rotate
from foedus.core.sparse import rand_k, random_mask, subsample, top_k
from foedus.core.stage import Stage, chain, clip
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, FoedusError, IncompatibleStages

from .updates import CONTEXT, cohorts, copies, encoded, merged_in_some_order, same_bits

Wide = NDArray[np.float64]


class Member(NamedTuple):
    """A stage, and what it should do.

    * ``make``: makes it; twice the same gives the same stage.
    * ``left(vector)``: what the server should find of an update [parameter] in float64.
    * ``error``: how far off an entry may be, as a share of the update's norm, beside float32's or float64's rounding.
    * ``keeps``: whether shape, dtype and weight go through unchanged. A stage that changes them says so here.
    """

    make: Callable[[], Stage]
    left: Callable[[Wide], Wide]
    error: float = 0.0
    keeps: bool = True


def clipped(norm: float) -> Callable[[Wide], Wide]:
    return lambda vector: vector * min(1.0, norm / max(math.hypot(*vector), 1e-300))


def unchanged(vector: Wide) -> Wide:
    return vector


def scaled(factor: float) -> Stage:
    """A user's own, that is undone by the server."""
    return Stage(
        lambda update, context: update._replace(vector=update.vector * update.vector.dtype.type(factor)),
        lambda update, context: update._replace(vector=update.vector / factor),
        f"scaled({factor})",
    )


MEMBERS = [
    Member(lambda: clip(3.0), clipped(3.0), error=2.0**-39),
    Member(lambda: clip(1e-3), clipped(1e-3), error=2.0**-39),
    Member(lambda: clip(1e9), unchanged),
    Member(lambda: scaled(0.25), unchanged),
    Member(lambda: rotate(), unchanged, error=2.0**-45),
    Member(lambda: rotate(own=True), unchanged, error=2.0**-45),
    Member(lambda: random_mask(1.0), unchanged),
    Member(lambda: random_mask(1.0, unbiased=False), unchanged),
    Member(lambda: subsample(1.0), unchanged),
    Member(lambda: rand_k(1.0), unchanged),
    Member(lambda: top_k(1.0), unchanged),
    Member(lambda: quantise(8), unchanged, error=2 / 255, keeps=False),
    Member(lambda: quantise(16), unchanged, error=2 / (2**16 - 1), keeps=False),
    Member(lambda: qsgd(100), unchanged, error=1 / 100, keeps=False),
    Member(lambda: drive(), unchanged, error=1 + 6**0.5, keeps=False),
    Member(lambda: eden(4), unchanged, error=0.5, keeps=False),
    Member(lambda: eden(8, biased=True), unchanged, error=0.2, keeps=False),
]
every = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.make().label)


def gone_through(stage: Stage, update: Update) -> NDArray[np.float64]:
    """What the server finds of one update [parameter]."""
    context = CONTEXT._replace(size=len(update.vector))
    sent = stage.encode(update, context)
    values = sent.vector.astype(np.float64) if stage.linear else sent.vector
    return np.asarray(stage.decode(sent._replace(vector=values), context).vector, np.float64)


def tolerance(member: Member, vector: NDArray[Any]) -> float:
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    return (member.error + 8 * float(np.finfo(vector.dtype).eps)) * norm + 1e-37


# --- one update ---------------------------------------------------------------------------------------------


@every
@given(cohorts())
def test_what_goes_through_is_what_the_stage_says(member: Member, cohort: list[Update]) -> None:
    """decode ∘ encode: the law that a server can undo what its clients did."""
    stage = member.make()
    for update in cohort:
        found = gone_through(stage, update)
        assert found.shape == update.vector.shape
        wanted = member.left(update.vector.astype(np.float64))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance(member, update.vector))


@every
@given(cohorts())
def test_shape_dtype_weight_and_the_argument_stay_as_they_are(member: Member, cohort: list[Update]) -> None:
    update = cohort[0]
    before = update.vector.copy()
    found = member.make().encode(update, CONTEXT)
    assert update.vector.tobytes() == before.tobytes()
    if member.keeps:
        assert (found.vector.shape, found.vector.dtype) == (before.shape, before.dtype)
        assert found.weight == update.weight


@every
@given(cohorts())
def test_decoding_leaves_its_argument_alone(member: Member, cohort: list[Update]) -> None:
    stage = member.make()
    context = CONTEXT._replace(size=len(cohort[0].vector))
    sent = stage.encode(cohort[0], context)
    before = sent._replace(vector=sent.vector.copy())
    assert stage.decode(sent, context).vector.tobytes() == stage.decode(before, context).vector.tobytes()
    assert sent.vector.tobytes() == before.vector.tobytes()


@every
@given(cohorts(), st.integers(0, 2**62), st.integers(1, 2**30), st.integers(0, 2**30))
def test_the_same_context_gives_the_same_bits(
    member: Member, cohort: list[Update], seed: int, round: int, client: int
) -> None:
    """Whatever was encoded before, by this stage, another one made alike, or one that came from another process."""
    one, context = member.make(), Context(seed, round, client)
    first = one.encode(cohort[0], context)
    for other in cohort:
        one.encode(other, context._replace(client=client + 1))
    for stage in (one, member.make(), cloudpickle.loads(cloudpickle.dumps(one))):
        again = stage.encode(cohort[0]._replace(vector=cohort[0].vector.copy()), context)
        assert (again.vector.tobytes(), again.weight) == (first.vector.tobytes(), first.weight)


@every
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 5])
def test_no_update_stays_no_update(member: Member, dtype: str, size: int) -> None:
    stage = member.make()
    found = stage.encode(Update(np.zeros(size, dtype), 3.0), CONTEXT)
    assert np.isfinite(found.vector).all(), "it divides by a norm of 0"
    assert not stage.decode(found, CONTEXT._replace(size=size)).vector.any()


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_is_refused_and_never_made_to_look_finite(member: Member, value: float, dtype: str) -> None:
    """By the stage, or by the sum behind it."""
    vector = np.array([1.0, value, -2.0], dtype)
    with np.errstate(invalid="ignore"), pytest.raises(FoedusError, match="not finite"):
        encoded(chain(member.make(), mean()), [Update(vector, 2.0)])


# --- in a chain ---------------------------------------------------------------------------------------------


@every
@given(cohorts(), st.integers(0, 2**32))
def test_behind_it_neither_order_nor_place_of_merging_changes_a_bit(
    member: Member, cohort: list[Update], seed: int
) -> None:
    rule, rng = chain(member.make(), mean()), np.random.default_rng(seed)
    messages = encoded(rule, cohort)
    one, other = (merged_in_some_order(rule, messages, rng) for _ in range(2))
    assert same_bits(one, other)
    context = CONTEXT._replace(size=len(cohort[0].vector))
    assert rule.decode({}, one, context)[0].tobytes() == rule.decode({}, other, context)[0].tobytes()


@every
@given(cohorts())
def test_the_mean_behind_it_is_the_mean_of_what_is_left(member: Member, cohort: list[Update]) -> None:
    """With even weights, so that nothing but the stage changes the updates."""
    rule = chain(member.make(), mean(weighted=False))
    total = fold(rule, copies(encoded(rule, cohort)))
    assert total is not None
    wanted = np.mean([member.left(u.vector.astype(np.float64)) for u in cohort], axis=0)
    slack = max(tolerance(member, u.vector) for u in cohort)
    np.testing.assert_allclose(
        rule.decode({}, total, CONTEXT._replace(size=len(wanted)))[0], wanted, rtol=1e-12, atol=slack + 2.0**-57
    )


@every
def test_its_label_tells_it_from_the_others_and_stands_in_the_chains(member: Member) -> None:
    label = member.make().label
    assert label == member.make().label, "a resumed run compares labels"
    assert [m.make().label for m in MEMBERS].count(label) == 1
    assert label in chain(member.make(), mean()).label
    assert "0x" not in label


@given(cohorts(), st.floats(1e-6, 1e6))
def test_clipping_bounds_the_norm_and_keeps_the_direction(cohort: list[Update], norm: float) -> None:
    vector = cohort[0].vector
    found = clip(norm).encode(cohort[0], CONTEXT).vector
    length = float(np.linalg.norm(vector.astype(np.float64)))
    assert np.linalg.norm(found.astype(np.float64)) <= norm * (1 + 1e-6)
    if length <= norm:
        assert found.tobytes() == vector.tobytes()
    else:
        np.testing.assert_allclose(found, vector.astype(np.float64) * norm / length, rtol=1e-6, atol=1e-37)


def test_stages_apply_from_left_to_right_and_are_undone_in_reverse() -> None:
    def scale(factor: float) -> Stage:
        return Stage(
            lambda u, c: u._replace(vector=u.vector * factor + 1),
            lambda u, c: u._replace(vector=(u.vector - 1) / factor),
            f"scale({factor})",
        )

    rule = chain(scale(2.0), scale(10.0), mean())
    message = rule.encode(Update(np.array([3.0]), 1.0), CONTEXT)
    assert message["values"].tolist() == [(3.0 * 2 + 1) * 10 + 1]
    assert rule.decode({}, rule.admit(message, CONTEXT), CONTEXT)[0].tolist() == [3.0]
    assert rule.label == "chain(scale(2.0), scale(10.0), mean())"
    assert rule.additive


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: chain(), "ends with an aggregator"),
        (lambda: chain(clip(1.0)), "ends with an aggregator"),
        (lambda: chain(mean(), clip(1.0)), "ends with an aggregator"),
        (lambda: chain(mean(), mean()), r"one aggregator, as its last part; mean\(\) stands before"),
        (lambda: clip(0.0), "norm must be a number above 0"),
        (lambda: clip(float("nan")), "norm must be a number above 0"),
    ],
)
def test_chains_that_make_no_sense_are_refused_when_built(build: Any, told: str) -> None:
    with pytest.raises((IncompatibleStages, ConfigurationError), match=told):
        build()


kinds = st.sampled_from(["f4", "f8"])
ordinary = st.floats(-8, 8).map(lambda power: 10.0**power)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@given(st.integers(0, 2**32), st.integers(1, 300), ordinary, st.floats(1.0, 1000.0))
def test_rounding_makes_no_clipped_update_too_long(
    dtype: str, seed: int, size: int, norm: float, longer: float
) -> None:
    """About every second factor, rounded to float32, would be too large."""
    for vector in np.random.default_rng(seed).standard_normal((20, size)).astype(dtype):
        scaled = (vector * (norm * longer / np.linalg.norm(vector))).astype(dtype)
        found = clip(norm).encode(Update(scaled, 1.0), CONTEXT).vector
        assert np.linalg.norm(found.astype("f8")) <= norm
        np.testing.assert_allclose(np.linalg.norm(found.astype("f8")), norm, rtol=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 300), st.floats(1e-100, 1e100), st.floats(1e-300, 1e150), kinds)
def test_a_clipped_update_is_never_longer_than_the_bound(
    seed: int, size: int, norm: float, length: float, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        vector = (rng.standard_normal(size) * length).astype(dtype)
    if not np.isfinite(vector).all():
        return
    found = clip(norm).encode(Update(vector, 1.0), CONTEXT).vector
    assert found.dtype == vector.dtype
    assert sum(Fraction(float(x)) ** 2 for x in found) <= Fraction(norm) ** 2  # in exact arithmetic
    before = np.linalg.norm(vector.astype("f8"))
    if before > norm > 1e-30 and norm / before > np.finfo(vector.dtype).tiny:  # a smaller factor is not precise
        assert np.linalg.norm(found.astype("f8")) <= norm
        np.testing.assert_allclose(np.linalg.norm(found.astype("f8")), norm, rtol=1e-6)
    assert clip(norm).encode(Update(found, 1.0), CONTEXT).vector is found, "clipping twice is clipping once"

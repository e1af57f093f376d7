"""A plan keeps what it promises: bytes on the wire, and error."""

import numpy as np
import pytest

from foedus.core.aggregate import message_bytes
from foedus.core.budget import plan_compression
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError
from foedus.tree import Layout

SIZE = 30_000
LAYOUT = Layout(("w", "b"), ((299, 100), (100,)), ("float32",) * 2)
assert LAYOUT.size == SIZE


def measured(rule: object, vector: np.ndarray, layout: Layout | None) -> tuple[int, float]:
    """Bytes and error of one update, the error as the mean of a few."""
    errors = []
    for seed in range(100, 106):
        context = Context(seed, 1, 0, layout, size=SIZE)
        message = rule.encode(Update(vector, 1.0), context)  # type: ignore[attr-defined]
        found, _ = rule.decode({}, rule.admit(message, context), context)  # type: ignore[attr-defined]
        errors.append(np.square(found - vector).sum() / np.square(vector).sum())
    return message_bytes(message), float(np.mean(errors))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [4, 8, 16, 30, 50, 200])
@pytest.mark.parametrize("model", [SIZE, LAYOUT], ids=["size", "layout"])
def test_the_chain_fits_and_errs_as_told(factor: int, model: int | Layout) -> None:
    budget = 4 * SIZE // factor
    plan = plan_compression(budget, model)
    vector = np.random.default_rng(0).standard_normal(SIZE).astype("f4")
    taken, error = measured(plan.aggregator, vector, LAYOUT)
    assert taken == plan.bytes <= budget
    assert error == pytest.approx(plan.error, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [8, 16, 40])
def test_additive_chains_add_up_and_fit(factor: int) -> None:
    plan = plan_compression(4 * SIZE // factor, SIZE, additive=True, norm=2.0)
    vector = np.random.default_rng(0).standard_normal(SIZE)
    vector = (2 * vector / np.linalg.norm(vector)).astype("f4")
    assert plan.aggregator.additive
    assert "quantise" in plan.aggregator.label
    taken, error = measured(plan.aggregator, vector, None)
    assert taken == plan.bytes <= 4 * SIZE // factor
    assert error == pytest.approx(plan.error, rel=0.1)


@pytest.mark.slow
def test_more_bytes_never_err_more() -> None:
    errors = [plan_compression(b, SIZE).error for b in (500, 2_000, 5_000, 10_000, 20_000, 30_000)]
    assert errors == sorted(errors, reverse=True)


def test_the_first_considered_is_the_chosen_and_the_best() -> None:
    plan = plan_compression(6_000, SIZE, feedback=True, probe=np.random.default_rng(0).standard_t(2, 9_000))
    assert plan.considered[0] == (plan.aggregator.label, plan.bytes, plan.error)
    assert [e for _, _, e in plan.considered] == sorted(e for _, _, e in plan.considered)
    assert any("error_feedback" in label for label, _, _ in plan.considered)


def test_a_probe_of_ones_own_decides() -> None:
    """Few large entries among many small ones: then the largest entries are nearly everything."""
    probe = np.full(SIZE, 1e-3)
    probe[:50] = np.random.default_rng(0).standard_normal(50) * 10
    plan = plan_compression(1_500, SIZE, feedback=True, probe=probe)
    assert "top_k" in plan.aggregator.label
    assert plan.error < 0.05


def test_a_budget_that_nothing_fits_is_refused_with_what_to_give() -> None:
    with pytest.raises(ConfigurationError, match=r"30,000 parameters in 10 bytes\. Give more bytes"):
        plan_compression(10, SIZE)
    with pytest.raises(ConfigurationError, match=r"adds up without a bound on its norm\. Give norm="):
        plan_compression(10, SIZE, additive=True)
    with pytest.raises(ConfigurationError, match="probe must be"):
        plan_compression(1_000, SIZE, probe=np.zeros(5))

"""The numpy trainer: local SGD equals the same written out by hand, and its errors say whose they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from foedus.backends import Assignment, Weights, open_trainer
from foedus.backends.numpy_backend import NumpyTrainer
from foedus.core.batches import plan
from foedus.core.client import Client, local_sgd, local_training, proximal
from foedus.core.linear import linear, logistic
from foedus.core.population import Examples
from foedus.core.task import Metric, NumpyModel, Task, accuracy, rmse
from foedus.errors import ConfigurationError, TrainingError

EXAMPLES = Examples.of(np.random.default_rng(5).normal(size=(23, 4)), np.arange(23) % 3, keep_dtype=True)


def assignment(spec: Client, examples: Examples = EXAMPLES, **changes: object) -> Assignment:
    own = plan(spec, np.array([len(examples)]), np.array([7]), seed=0, round=2)
    return Assignment(spec, examples, own, 2, "anna")._replace(**changes)


def trainer(dtype: str = "float64") -> NumpyTrainer:
    opened = open_trainer(Task(logistic(4, 3, dtype=dtype), metrics=[accuracy]), seed=1)
    assert isinstance(opened, NumpyTrainer)
    return opened


def by_hand(start: Weights, work: Assignment, *, clip: float, momentum: float, decay: float, mu: float) -> np.ndarray:
    """Local SGD with everything on, over the flat vector."""
    model, layout = trainer().net, trainer().layout
    w, m = start.vector, np.zeros_like(start.vector)
    for rows, count in zip(work.plan.rows, work.plan.count, strict=True):
        part = work.examples.take(rows[:count])
        g = layout.flatten(model.gradient(layout.unflatten(w), part.inputs, part.targets)[1])
        g = g + mu * (w - start.vector)
        g = g * min(1.0, clip / np.linalg.norm(g))
        m = momentum * m + g + decay * w
        w = w - 0.3 * m
    return w


def test_local_sgd_with_everything_on_is_what_the_formulas_say() -> None:
    spec = local_sgd(
        lr=lambda r: 0.6 / r, epochs=3, batch_size=5, momentum=0.9, weight_decay=0.1, clip_norm=0.2,
        penalty=proximal(0.5),
    )  # fmt: skip
    start = Weights(np.random.default_rng(1).normal(size=15), np.empty(0, np.float32))
    work = assignment(spec)
    trained = trainer().train(start, work)
    wanted = by_hand(start, work, clip=0.2, momentum=0.9, decay=0.1, mu=0.5)
    np.testing.assert_allclose(trained.weights.vector, wanted, rtol=1e-10)
    assert np.isfinite(trained.loss)


def test_the_received_weights_are_not_changed_and_every_step_is_observed() -> None:
    seen: list[np.ndarray] = []
    start = trainer().initial()
    before = start.vector.copy()
    work = assignment(local_sgd(lr=0.1, batch_size=10), observe=lambda step, w: seen.append(w.vector.copy()))
    trained = trainer().train(start, work)
    assert np.array_equal(start.vector, before)
    assert len(seen) == 4  # before, and after each of 3 steps
    assert np.array_equal(seen[0], before)
    assert np.array_equal(seen[-1], trained.weights.vector)
    assert len({v.tobytes() for v in seen}) == 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_of_the_parameters_is_kept(dtype: str) -> None:
    trained = trainer(dtype).train(trainer(dtype).initial(), assignment(local_sgd(lr=0.1, clip_norm=1.0)))
    assert trained.weights.vector.dtype == dtype


def test_evaluation_is_exact_over_batches() -> None:
    examples = Examples.of(np.random.default_rng(2).normal(size=(2500, 4)), np.arange(2500) % 3)
    own = trainer()
    weights = Weights(np.random.default_rng(3).normal(size=15), np.empty(0, np.float32))
    figures, scores = own.evaluate(weights, examples), own.predict(weights, examples)
    assert figures["accuracy"] == pytest.approx((scores.argmax(1) == examples.targets).mean(), rel=1e-12)
    loss, _ = own.net.gradient(own.model(weights), examples.inputs, examples.targets)
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_regression_metrics_and_an_empty_set() -> None:
    own = open_trainer(Task(linear(4), metrics=[rmse]), seed=0)
    empty = Examples.of(np.ones((0, 4)), np.ones(0))
    assert own.predict(own.initial(), empty).shape == (0,)
    assert np.isnan(own.evaluate(own.initial(), empty)["rmse"])
    one = Examples.of(np.ones((2, 4)), np.array([3.0, 4.0]))
    assert own.evaluate(own.initial(), one) == pytest.approx({"loss": 6.25, "rmse": 12.5**0.5})


def test_first_weights_are_a_function_of_the_seed() -> None:
    noisy = NumpyModel(lambda g: {"w": g.normal(size=3)}, lambda p, x: x @ p["w"], lambda p, x, y: (0.0, p))
    first, again, other = (open_trainer(Task(noisy), seed=s).initial().vector for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_failing_step_says_whose_and_where() -> None:
    bad = Examples(EXAMPLES.inputs, np.where(np.arange(23) == 20, 9, EXAMPLES.targets))
    with pytest.raises(TrainingError, match=r"client 'anna' in round 2, step .*0 to 2") as caught:
        trainer().train(trainer().initial(), assignment(local_sgd(lr=0.1, batch_size=1), bad))
    assert caught.value.batch[1].tolist() == [9]


def test_a_run_that_diverges_gives_numbers_that_are_refused_later_without_a_warning() -> None:
    own = open_trainer(Task(linear(4)), seed=0)
    huge = Examples.of(np.full((4, 4), 1e30), np.ones(4))
    trained = own.train(own.initial(), assignment(local_sgd(lr=1e9, epochs=3), huge))
    assert not np.isfinite(trained.weights.vector).all()


EMPTY = NumpyModel(lambda g: {}, lambda p, x: x, lambda p, x, y: (0.0, p))
WHOLE = NumpyModel(lambda g: {"w": np.zeros(3, int)}, lambda p, x: x, lambda p, x, y: (0.0, p))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: open_trainer(Task(EMPTY), seed=0), "at least one; it gave an empty"),
        (lambda: open_trainer(Task(WHOLE), seed=0), "not so: w"),
        (
            lambda: trainer().train(trainer().initial(), assignment(local_training(optimiser=lambda p: None))),
            "no torch module",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        wrong()


def test_a_metric_of_the_users_own_sees_numpy_arrays() -> None:
    own = Metric("spread", lambda output, target: np.ptp(output, axis=1))
    figures = open_trainer(Task(logistic(4, 3), metrics=[own]), seed=0).evaluate(trainer().initial(), EXAMPLES)
    assert figures["spread"] == 0.0

"""Linear models: gradients by hand equal finite differences, alone and for a cohort at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.linear import linear, logistic
from foedus.core.task import NumpyModel
from foedus.errors import ConfigurationError

RNG = np.random.default_rng(0)
MODELS = {
    "linear": (linear(3, dtype="float64"), lambda rng, n: rng.normal(size=n)),
    "linear, two outputs": (linear(3, 2, dtype="float64"), lambda rng, n: rng.normal(size=(n, 2))),
    "logistic": (logistic(3, 4, dtype="float64"), lambda rng, n: rng.integers(4, size=n)),
}


def somewhere(model: NumpyModel, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=a.shape) for name, a in model.init(rng).items()}


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 7))
def test_gradients_are_finite_differences(name: str, seed: int, count: int) -> None:
    model, targets = MODELS[name]
    rng = np.random.default_rng(seed)
    parameters, x, y = somewhere(model, rng), rng.normal(size=(count, 3)), targets(rng, count)
    _, gradients = model.gradient(parameters, (x,), y)
    for name, array in parameters.items():
        direction = rng.normal(size=array.shape)
        ends = [model.gradient({**parameters, name: array + h * direction}, (x,), y)[0] for h in (1e-5, -1e-5)]
        slope = float((gradients[name] * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_a_cohort_at_once_equals_its_clients_one_by_one(name: str) -> None:
    model, targets = MODELS[name]
    rng = np.random.default_rng(0)
    clients = [(somewhere(model, rng), rng.normal(size=(6, 3)), targets(rng, 6)) for _ in range(5)]
    stacked = {name: np.stack([p[name] for p, _, _ in clients]) for name in clients[0][0]}
    x, y = np.stack([x for _, x, _ in clients]), np.stack([y for _, _, y in clients])
    losses, gradients = model.gradient(stacked, (x,), y)
    outputs = model.predict(stacked, x)
    for i, (parameters, own_x, own_y) in enumerate(clients):
        loss, own = model.gradient(parameters, (own_x,), own_y)
        assert losses[i] == pytest.approx(loss, rel=1e-14)
        np.testing.assert_allclose(outputs[i], model.predict(parameters, own_x), rtol=1e-12)
        for name in own:
            np.testing.assert_allclose(gradients[name][i], own[name], rtol=1e-12, atol=1e-15)


def test_images_are_flattened_and_arithmetic_stays_in_the_models_dtype() -> None:
    model = logistic(4, 2)
    parameters = model.init(np.random.default_rng(0))
    loss, gradients = model.gradient(parameters, (np.ones((3, 2, 2)),), np.array([0, 1, 1]))
    assert model.predict(parameters, np.ones((3, 2, 2))).shape == (3, 2)
    assert loss.dtype == gradients["weight"].dtype == np.float32


def test_scores_beyond_the_range_of_exp_keep_a_finite_loss() -> None:
    model = logistic(1, 2)
    parameters = {"weight": np.array([[1000.0, -1000.0]], np.float32), "bias": np.zeros(2, np.float32)}
    loss, gradients = model.gradient(parameters, (np.ones((1, 1), np.float32),), np.array([1]))
    assert float(loss) == 2000.0
    assert gradients["bias"].tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: logistic(3, 1), "at least 2 classes"),
        (lambda: linear(0), "features must be"),
        (lambda: linear(3, dtype="float16"), "float16"),
        (lambda: linear(3).gradient(linear(3).init(RNG), (np.ones((2, 4)),), np.ones(2)), "3 features"),
        (lambda: logistic(3, 2).gradient(logistic(3, 2).init(RNG), (np.ones((1, 3)),), np.array([2])), "0 to 1"),
        (lambda: linear(3).predict(linear(3).init(RNG), np.ones((2, 3)), np.ones((2, 3))), "one input"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        wrong()  # type: ignore[operator]

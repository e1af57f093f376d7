"""The conformance suite of penalties: the gradient is that of the value, in every array library, batched and traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray

from foedus.core.client import Penalty, local_sgd, proximal
from foedus.errors import ConfigurationError

SHAPES = [(4, 3), (5,), (1,), (), (0,)]


class Member(NamedTuple):
    """A penalty; ``anchored``: whether it is nothing, and has no slope, at the received weights."""

    penalty: Penalty
    anchored: bool


ridge = Penalty(lambda w, r: (w**2).sum(), lambda w, r: 2 * w, "ridge()")
smooth = Penalty(  # a user's own that is not quadratic: about |w − r| for large differences
    lambda w, r: (((w - r) ** 2 + 1) ** 0.5 - 1).sum(), lambda w, r: (w - r) / ((w - r) ** 2 + 1) ** 0.5, "smooth()"
)
MEMBERS = [
    Member(proximal(0.0), True),
    Member(proximal(0.7), True),
    Member(proximal(30), True),
    Member(ridge, False),
    Member(smooth, True),
]
every = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.penalty.label)
seeds = st.integers(0, 2**32)


def weights(seed: int, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights and received weights, float64, of all magnitudes."""
    rng = np.random.default_rng(seed)
    return tuple(np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3)) for _ in range(2))  # type: ignore[return-value]


def slopes(value: Callable[[NDArray[Any]], float], at: NDArray[Any]) -> NDArray[np.float64]:
    """Central differences: brute force, one entry after the other."""
    found = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        step = 1e-5 * max(1.0, abs(float(at[place])))
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        found[place] = (value(up) - value(down)) / (2 * step)
    return found


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seeds)
def test_the_gradient_is_the_slope_of_the_value(member: Member, shape: tuple[int, ...], seed: int) -> None:
    w, received = weights(seed, shape)
    found = np.asarray(member.penalty.gradient(w, received))
    assert found.shape == shape
    wanted = slopes(lambda v: float(member.penalty.value(v, received)), w)
    scale = 1 + float(np.abs(member.penalty.value(w, received)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9 * scale)


@every
@given(seeds)
def test_the_gradient_is_what_torch_derives_from_the_value(member: Member, seed: int) -> None:
    w, received = (torch.tensor(a) for a in weights(seed, (5,)))
    w.requires_grad_(True)
    (wanted,) = torch.autograd.grad(member.penalty.value(w, received), w)
    np.testing.assert_allclose(member.penalty.gradient(w, received).detach(), wanted, rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_value_is_one_number_and_the_terms_of_parts_add_up(member: Member, shape: tuple[int, ...]) -> None:
    """A model cut into other arrays has the same penalty."""
    w, received = weights(3, shape)
    whole = member.penalty.value(w, received)
    assert np.shape(whole) == ()
    parts = [member.penalty.value(a, r) for a, r in zip(w.reshape(-1), received.reshape(-1), strict=True)]
    assert float(whole) == pytest.approx(float(np.sum(parts)), rel=1e-12, abs=1e-12)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_the_received_weights_there_is_nothing_to_pay(member: Member, shape: tuple[int, ...]) -> None:
    w, _ = weights(5, shape)
    if member.anchored:
        assert float(member.penalty.value(w, w.copy())) == 0
        assert not np.any(member.penalty.gradient(w, w.copy()))
    else:
        assert np.any(member.penalty.gradient(w, w.copy())) == bool(w.size)


@pytest.mark.slow  # jax compiles
@every
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_torch_and_jax_agree_and_keep_their_dtypes(member: Member, dtype: str) -> None:
    w, received = (a.astype(dtype) for a in weights(7, (4, 3)))
    penalty, tolerance = member.penalty, 50 * float(np.finfo(dtype).eps)
    value, gradient = penalty.value(w, received), penalty.gradient(w, received)
    assert gradient.dtype == dtype
    with jax.enable_x64(dtype == "float64"):
        for pair in ((torch.tensor(w), torch.tensor(received)), (jnp.asarray(w), jnp.asarray(received))):
            found = penalty.gradient(*pair)
            assert type(found).__module__.split(".")[0] == type(pair[0]).__module__.split(".")[0], "made into numpy's"
            assert str(found.dtype).removeprefix("torch.") == dtype
            np.testing.assert_allclose(np.asarray(found), gradient, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(float(penalty.value(*pair)), float(value), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@every
def test_it_can_be_batched_over_clients_and_traced(member: Member) -> None:
    """As the vectorised and the compiled executor do it: [client, ...] beside the received weights of all."""
    stack, received = np.stack([weights(s, (3,))[0] for s in range(4)]), weights(9, (3,))[1]
    wanted = np.stack([member.penalty.gradient(w, received) for w in stack])
    by_torch = torch.vmap(member.penalty.gradient, in_dims=(0, None))(torch.tensor(stack), torch.tensor(received))
    np.testing.assert_allclose(by_torch, wanted, rtol=1e-12, atol=1e-14)
    with jax.enable_x64(True):
        by_jax = jax.jit(jax.vmap(member.penalty.gradient, in_axes=(0, None)))(stack, received)
        np.testing.assert_allclose(np.asarray(by_jax), wanted, rtol=1e-12, atol=1e-14)


@every
def test_its_arguments_stay_as_they_are(member: Member) -> None:
    w, received = weights(1, (4, 3))
    kept = w.tobytes(), received.tobytes()
    first = np.asarray(member.penalty.gradient(w, received)).tobytes()
    member.penalty.value(w, received)
    assert np.asarray(member.penalty.gradient(w, received)).tobytes() == first
    assert (w.tobytes(), received.tobytes()) == kept


@every
def test_its_label_tells_it_from_the_others_and_stands_in_the_rules(member: Member) -> None:
    assert [m.penalty.label for m in MEMBERS].count(member.penalty.label) == 1
    assert f"penalty={member.penalty.label}" in local_sgd(0.1, penalty=member.penalty).label


def test_values_out_of_range_are_refused() -> None:
    for wrong in (-0.1, float("nan"), float("inf"), "1"):
        with pytest.raises(ConfigurationError, match="mu must be a number"):
            proximal(wrong)  # type: ignore[arg-type]

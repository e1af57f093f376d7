"""The local training rule: one set of lines for numpy, torch and jax, and torch's own optimiser is the oracle."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from foedus.core.client import LocalSGD, Penalty, descend, local_sgd, local_training, proximal
from foedus.errors import ConfigurationError

ridge = Penalty(lambda w, r: (w**2).sum(), lambda w, r: 2 * w, "ridge()")

SPECS = {
    "plain": local_sgd(0.1),
    "momentum": local_sgd(0.1, momentum=0.9),
    "decay": local_sgd(0.1, weight_decay=0.3),
    "clipped": local_sgd(0.1, clip_norm=0.5),
    "proximal": local_sgd(0.1, penalty=proximal(0.7)),
    "all": local_sgd(0.1, momentum=0.5, weight_decay=0.1, clip_norm=0.8, penalty=ridge),
}
SHAPES = [(3, 2), (2,), (), (0,)]
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
seeds = st.integers(0, 2**32)


def steps(seed: int, count: int = 4) -> tuple[list[Any], list[list[Any]]]:
    """Starting weights, and the gradients of some steps, sometimes longer than the clipping norm."""
    rng = np.random.default_rng(seed)
    grads = [[rng.normal(size=s) * 10.0 ** rng.integers(-2, 2) for s in SHAPES] for _ in range(count)]
    return [np.asarray(rng.normal(size=s)) for s in SHAPES], [[np.asarray(g) for g in gs] for gs in grads]


def walk(spec: LocalSGD, params: list[Any], grads: list[list[Any]], zeros: Any) -> list[Any]:
    received, memory = list(params), [zeros(p) for p in params] if spec.momentum else []
    for gradient in grads:
        params, memory = descend(spec, params, gradient, memory=memory, received=received, lr=spec.rate(1))
    return params


def by_torch(spec: LocalSGD, params: list[Any], grads: list[list[Any]]) -> list[Any]:
    """What a plain torch loop does: clip_grad_norm_, then SGD."""
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    received = [t.detach().clone() for t in tensors]
    optimiser = torch.optim.SGD(tensors, lr=0.1, momentum=spec.momentum, weight_decay=spec.weight_decay)
    for gradient in grads:
        optimiser.zero_grad()
        loss = sum((t * torch.tensor(g)).sum() for t, g in zip(tensors, gradient, strict=True))
        if spec.penalty is not None:
            loss = loss + sum(spec.penalty.value(t, r) for t, r in zip(tensors, received, strict=True))
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors, spec.clip_norm)
        optimiser.step()
    return [t.detach().numpy() for t in tensors]


@specs
@given(seeds)
def test_one_client_alone_is_the_plain_torch_loop(spec: LocalSGD, seed: int) -> None:
    """torch adds 1e-6 to the norm it divides by, hence the tolerance where clipping is on."""
    params, grads = steps(seed)
    ours = walk(spec, params, grads, np.zeros_like)
    theirs = by_torch(spec, params, grads)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5 if spec.clip_norm else 1e-12, atol=1e-6 if spec.clip_norm else 1e-12)


@pytest.mark.slow
@specs
@settings(max_examples=10)
@given(seeds)
def test_numpy_torch_and_jax_run_the_same_lines(spec: LocalSGD, seed: int) -> None:
    params, grads = steps(seed)
    wanted = walk(spec, params, grads, np.zeros_like)
    as_torch = walk(
        spec,
        [torch.tensor(p) for p in params],
        [[torch.tensor(g) for g in gs] for gs in grads],
        torch.zeros_like,
    )
    with jax.enable_x64(True):
        as_jax = walk(
            spec,
            [jnp.asarray(p) for p in params],
            [[jnp.asarray(g) for g in gs] for gs in grads],
            jnp.zeros_like,
        )
        as_jax = [np.asarray(p) for p in as_jax]
    for a, b, c in zip(wanted, as_torch, as_jax, strict=True):
        np.testing.assert_allclose(b.numpy(), a, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(c, a, rtol=1e-13, atol=1e-15)


@pytest.mark.slow
@specs
def test_it_can_be_traced_and_batched(spec: LocalSGD) -> None:
    """As the compiled and the vectorised executors do it."""
    params, grads = steps(7, count=1)

    def step(params: Any, grads: Any) -> Any:
        memory = [0 * p for p in params] if spec.momentum else []
        return descend(spec, params, grads, memory=memory, received=params, lr=0.1)[0]

    wanted = step(params, grads[0])
    with jax.enable_x64(True):
        both = jax.jit(jax.vmap(step))([np.stack([p, p]) for p in params], [np.stack([g, g]) for g in grads[0]])
    stacked = torch.func.vmap(lambda *leaves: step(list(leaves[:4]), list(leaves[4:])))(
        *(torch.tensor(np.stack([a, a])) for a in [*params, *grads[0]])
    )
    for w, a, b in zip(wanted, both, stacked, strict=True):
        for found in (*np.asarray(a), *b.numpy()):
            np.testing.assert_allclose(found, w, rtol=1e-12, atol=1e-14)


@specs
def test_arguments_are_not_changed(spec: LocalSGD) -> None:
    params, grads = steps(3, count=1)
    kept = [a.copy() for a in [*params, *grads[0]]]
    walk(spec, params, grads, np.zeros_like)
    assert [a.tobytes() for a in [*params, *grads[0]]] == [a.tobytes() for a in kept]


@given(seeds, st.floats(1e-3, 1e3))
def test_clipping_bounds_the_whole_gradient_and_leaves_shorter_ones_alone(seed: int, norm: float) -> None:
    params, (grads, *_) = steps(seed)
    spec = local_sgd(1.0, clip_norm=norm)
    moved, _ = descend(spec, params, grads, memory=[], received=params, lr=1.0)
    step = np.concatenate([(p - m).reshape(-1) for p, m in zip(params, moved, strict=True)])
    full = np.concatenate([g.reshape(-1) for g in grads])
    assert np.linalg.norm(step) <= norm * (1 + 1e-9)
    np.testing.assert_allclose(step, full * min(1, norm / max(np.linalg.norm(full), 1e-300)), rtol=1e-6, atol=1e-9)


def test_a_gradient_of_zero_can_be_clipped() -> None:
    zero = [np.zeros(3, np.float32)]
    assert descend(local_sgd(0.1, clip_norm=1.0), zero, zero, memory=[], received=zero, lr=0.1)[0][0].tolist() == [
        0,
        0,
        0,
    ]


# --- values as the user writes them -------------------------------------------------------------------------


def test_learning_rates_follow_the_round() -> None:
    spec = local_sgd(lr=lambda round: 0.5 / round)
    assert [spec.rate(r) for r in (1, 2, 5)] == [0.5, 0.25, 0.1]
    assert local_training(optimiser=torch.optim.AdamW).rate(3) == 0
    assert local_training(optimiser=torch.optim.AdamW, lr=0.2).rate(3) == 0.2


def test_a_schedule_that_goes_wrong_says_in_which_round() -> None:
    with pytest.raises(ConfigurationError, match=r"gives -0.5 in round 3"):
        local_sgd(lr=lambda r: 1.0 - 0.5 * r).rate(3)
    with pytest.raises(ConfigurationError, match="gives nan in round 1"):
        local_sgd(lr=lambda r: float("nan")).rate(1)


def test_one_epoch_if_nothing_is_said() -> None:
    assert (local_sgd(0.1).epochs, local_sgd(0.1).steps) == (1, None)
    assert (local_sgd(0.1, steps=3).epochs, local_sgd(0.1, steps=3).steps) == (None, 3)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: local_sgd(-0.1), "lr must"),
        (lambda: local_sgd(float("inf")), "lr must"),
        (lambda: local_sgd(float("nan")), "lr must"),
        (lambda: local_sgd(0.1, epochs=1, steps=2), "epochs or steps, not both"),
        (lambda: local_sgd(0.1, epochs=0), "epochs must be a whole number of at least 1, not 0"),
        (lambda: local_sgd(0.1, steps=1.5), "steps must be a whole number"),
        (lambda: local_sgd(0.1, batch_size=0), "batch_size must"),
        (lambda: local_sgd(0.1, momentum=1.0), "momentum must"),
        (lambda: local_sgd(0.1, weight_decay=-1), "weight_decay must"),
        (lambda: local_sgd(0.1, clip_norm=0.0), "clip_norm must"),
        (lambda: local_sgd(0.1, clip_norm=float("inf")), "clip_norm must"),
        (lambda: local_training(), "give one of the two"),
        (lambda: local_training(optimiser=torch.optim.SGD, loop=print), "give one of the two"),
    ],
)
def test_values_out_of_range_are_refused(build: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        build()

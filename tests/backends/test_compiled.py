"""The compiled cohort: equal to the plain torch trainer, and the same bits on any number of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foedus.backends.compiled import (
    CohortProgram,
    Recipe,
    Results,
    aligned,
    balanced,
    cpu_devices,
    empty_aligned,
    pooled,
    roomy,
    stacked,
)
from foedus.backends.lowering import Batch, lower, tensors_of
from foedus.backends.torch_backend import TorchTrainer
from foedus.backends.trainer import Assignment, Weights
from foedus.core.batches import plan as make_plan
from foedus.core.client import LocalSGD, local_sgd, proximal
from foedus.core.examples import Examples
from foedus.core.task import Task
from foedus.tree import Layout

DEVICES = cpu_devices(2)  # when the tests are collected: jax fixes the number when it is first used
SIZES = np.array([13, 4, 9, 1, 20, 7, 6])
SEED, ROUND = 5, 3


def objective(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return (functional.cross_entropy(output, target, reduction="none") * mask).sum() / mask.sum()


class Case:
    """A model, a cohort's data, and its round by the plain trainer and by the compiled program."""

    def __init__(
        self, make: Callable[[], nn.Module], spec: LocalSGD, *, dtype: torch.dtype = torch.float64, sizes: Any = SIZES
    ) -> None:
        torch.manual_seed(1)
        self.spec, self.sizes, self.cohort = spec, np.asarray(sizes), np.arange(len(sizes)) * 3 + 1
        self.task = Task(lambda: make().to(dtype), functional.cross_entropy)
        self.trainer = TorchTrainer(self.task, self.task.model().train(), "cpu")  # type: ignore[operator, union-attr]
        x = torch.randn(int(self.sizes.sum()), 6, dtype=dtype).numpy()
        y = np.random.default_rng(0).integers(0, 3, len(x))
        self.examples = Examples((x,), y)
        self.begin = np.cumsum(self.sizes) - self.sizes
        self.plan = make_plan(spec, self.sizes, self.cohort, seed=SEED, round=ROUND)
        self.start = self.trainer.initial()

    def plainly(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        updates, buffers, losses = [], [], []
        for slot, size in enumerate(self.sizes):
            own = Examples(
                (self.examples.inputs[0][self.begin[slot] :][:size],), self.examples.targets[self.begin[slot] :][:size]
            )
            work = Assignment(self.spec, own, self.plan.of(np.array([slot])), ROUND, slot)
            trained = self.trainer.train(self.start, work)
            updates.append(trained.weights.vector - self.start.vector)
            buffers.append(trained.weights.buffers - self.start.buffers)
            losses.append(trained.loss)
        return np.stack(updates), np.stack(buffers), np.array(losses)

    def program(self, devices: list[Any]) -> CohortProgram:
        module = self.trainer.module.train()
        width = self.plan.rows.shape[1]
        rows = np.arange(width) % len(self.examples)
        batch = Batch(
            (torch.from_numpy(self.examples.inputs[0][rows]),), torch.from_numpy(self.examples.targets[rows]),
            torch.ones(width, dtype=torch.from_numpy(self.examples.inputs[0]).dtype), torch.zeros(2, dtype=torch.int32),
        )  # fmt: skip
        frozen = {n: p.numpy() for n, p in tensors_of(module)[1].items()}
        step = lower(module, objective, batch).step
        layouts = (self.trainer.layout, self.trainer.buffer_layout)
        return CohortProgram(Recipe(step, self.spec, *layouts, frozen), devices)

    def compiled(self, devices: list[Any]) -> Results:
        program = self.program(devices)
        at = pooled(self.plan, np.arange(len(self.examples)), self.begin)
        return program.run(self.start, program.hold(self.examples), at, lr=self.spec.rate(ROUND))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 3))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    net[0].requires_grad_(False)
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], LocalSGD]] = {
    "plain": (mlp, local_sgd(lr=0.3, epochs=2, batch_size=4)),
    "steps": (mlp, local_sgd(lr=lambda r: 0.3 / r, steps=5, batch_size=4)),
    "whole": (mlp, local_sgd(lr=0.3, epochs=2, batch_size=None)),
    "momentum": (mlp, local_sgd(lr=0.1, epochs=2, batch_size=4, momentum=0.9, weight_decay=0.01)),
    "clipped": (mlp, local_sgd(lr=0.3, epochs=2, batch_size=4, clip_norm=0.2, penalty=proximal(0.5))),
    "dropout": (dropped, local_sgd(lr=0.3, epochs=2, batch_size=4)),
    "frozen": (frozen, local_sgd(lr=0.3, epochs=2, batch_size=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_round_equals_the_plain_trainer(name: str) -> None:
    case = Case(*CASES[name])
    updates, buffers, losses = case.plainly()
    found = case.compiled(DEVICES)
    assert found.matrix.dtype == np.float64
    np.testing.assert_allclose(found.matrix, updates, rtol=0, atol=1e-10 * np.abs(updates).max())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-10)
    assert np.stack(found.buffers).shape == buffers.shape == (len(SIZES), 0)


@pytest.mark.slow
def test_running_statistics_come_back() -> None:
    case = Case(normed, local_sgd(lr=0.1, epochs=2, batch_size=4), sizes=[8, 10, 4, 7])
    updates, buffers, _ = case.plainly()
    found = case.compiled(DEVICES)
    np.testing.assert_allclose(found.matrix, updates, rtol=0, atol=1e-10 * np.abs(updates).max())
    np.testing.assert_allclose(np.stack(found.buffers), buffers, rtol=1e-5, atol=1e-6)
    assert np.stack(found.buffers)[:, -1].tolist() == [4, 6, 2, 4]  # batches tracked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "clipped", "dropout"])
def test_one_device_or_two_the_same_bits(name: str) -> None:
    assert len(DEVICES) == 2
    make, spec = CASES[name]
    case = Case(make, spec, dtype=torch.float32)
    one, two = case.compiled(DEVICES[:1]), case.compiled(DEVICES)
    assert one.matrix.dtype == np.float32
    assert one.matrix.tobytes() == two.matrix.tobytes()
    assert one.losses.tobytes() == two.losses.tobytes()


@pytest.mark.slow
def test_a_client_does_not_depend_on_its_cohort() -> None:
    make, spec = CASES["plain"]
    all_, few = Case(make, spec, dtype=torch.float32), Case(make, spec, dtype=torch.float32)
    slots = np.array([4, 1])
    few.plan = few.plan.of(slots)
    few.begin = few.begin[slots]
    assert np.array_equal(few.compiled(DEVICES).matrix, all_.compiled(DEVICES).matrix[slots])


@pytest.mark.slow
def test_other_sizes_compile_nothing_anew() -> None:
    case = Case(mlp, local_sgd(lr=0.3, batch_size=4))
    program = case.program(DEVICES)
    pool = program.hold(case.examples)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 1], [3], [5, 4, 2]):
        plan = pooled(case.plan, np.arange(len(case.examples)), case.begin).of(np.array(order))
        assert len(program.run(case.start, pool, plan, lr=0.1).updates) == len(order)
    assert program._call._cache_size() == 1


def test_a_client_without_steps_changes_nothing() -> None:
    program, pool = _linear()
    spec = local_sgd(lr=0.1, batch_size=2)
    plan = make_plan(spec, np.array([2, 2]), np.array([0, 1]), seed=0, round=1)
    plan = plan._replace(steps=np.array([1, 0], np.int32)).of(np.array([0, 1]))
    found = program.run(Weights(np.ones(4, np.float32), np.zeros(0, np.float32)), pool, plan, lr=0.1)
    assert found.updates[0].any()
    assert not found.updates[1].any()
    assert np.isnan(found.losses[1])


def test_a_nan_loss_spoils_the_update() -> None:
    program, pool = _linear(target=jnp.nan)
    plan = make_plan(local_sgd(lr=0.1, batch_size=2), np.array([2]), np.array([0]), seed=0, round=1)
    found = program.run(Weights(np.ones(4, np.float32), np.zeros(0, np.float32)), pool, plan, lr=0.0)
    assert np.isnan(found.updates[0]).all()


def test_a_step_of_jax_with_narrow_types() -> None:
    """A step that never met torch, in jax's default types; by hand: one step of least squares."""
    program, pool = _linear()
    start = Weights(np.zeros(4, np.float32), np.zeros(0, np.float32))
    plan = make_plan(local_sgd(lr=0.1, batch_size=2), np.array([2]), np.array([0]), seed=0, round=1)
    found = program.run(start, pool, plan, lr=0.5)
    x, y = np.arange(8, dtype=np.float32).reshape(2, 4), np.array([3.0, -1.0], np.float32)
    np.testing.assert_allclose(found.updates[0], -0.5 * (-2 * y) @ x / 2, rtol=1e-6)
    np.testing.assert_allclose(found.losses, [(y * y).mean()], rtol=1e-6)


def _linear(target: float = 0.0) -> tuple[CohortProgram, Any]:
    def loss(params: Any, inputs: Any, target: Any, mask: Any) -> Any:
        return jnp.sum(mask * (inputs[0] @ params["w"] - target) ** 2) / mask.sum()

    def step(params: Any, frozen: Any, buffers: Any, inputs: Any, target: Any, mask: Any, key: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, inputs, target, mask)
        return value, grads, buffers

    layout = Layout.of({"w": np.zeros(4, np.float32)})
    recipe = Recipe(step, local_sgd(lr=0.1, batch_size=2), layout, Layout((), (), ()), wide=False)
    program = CohortProgram(recipe, DEVICES)
    x, y = np.arange(8, dtype=np.float32).reshape(2, 4), np.array([3.0, -1.0], np.float32) + np.float32(target)
    return program, program.hold(Examples((x,), y))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5))
def test_balanced_deals_out_everybody_once(steps: list[int], count: int) -> None:
    """Greedy dealing is never worse than 4/3 of the best split (Graham 1969), up to the 1 a client costs."""
    deal = balanced(np.array(steps), count)
    assert sorted(np.concatenate(deal).tolist()) == list(range(len(steps)))
    loads = [sum(steps[i] + 1 for i in part) for part in deal]
    least = max(sum(s + 1 for s in steps) / count, max(steps) + 1)
    assert max(loads) <= least * 4 / 3 + max(steps) + 1


@given(st.integers(0, 10**6))
def test_roomy_adds_at_most_a_quarter(count: int) -> None:
    assert max(count, 1) <= roomy(count) <= max(4, count * 1.25)
    assert roomy(roomy(count)) == roomy(count)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_stacked_keeps_every_client(sizes: list[int]) -> None:
    parts = [Examples((np.full((n, 3), float(i)), np.arange(n)), np.arange(n)) for i, n in enumerate(sizes)]
    whole, begin = stacked(parts)
    assert len(whole) >= sum(sizes)
    for part, at in zip(parts, begin, strict=True):
        for ours, theirs in zip((*whole.inputs, whole.targets), (*part.inputs, part.targets), strict=True):
            assert np.array_equal(ours[at : at + len(part)], theirs)
            assert ours.dtype == theirs.dtype


def test_aligned_memory_is_read_in_place() -> None:
    held = empty_aligned((100, 7), np.float32)
    held[:] = 3
    assert aligned(held) is held
    on_device = jax.device_put(held, DEVICES[0])
    assert on_device.unsafe_buffer_pointer() == held.ctypes.data
    crooked = np.ones((100, 7), np.float32)[:, ::2]
    assert np.array_equal(aligned(crooked), crooked)

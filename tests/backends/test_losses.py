"""The evaluated loss is the user's own loss on all outputs and targets, however they were batched."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn import functional as F

from foedus.backends import Assignment, jax_backend, numpy_backend, open_trainer, torch_backend, trainer
from foedus.backends.trainer import Losses, Mean, labelled
from foedus.core.batches import plan
from foedus.core.client import local_sgd
from foedus.core.compose import fedavg
from foedus.core.examples import Examples
from foedus.core.population import Clients
from foedus.core.task import JaxModel, NumpyModel, Task
from foedus.errors import ConfigurationError, TrainingError
from foedus.rounds.work import Job, Orders
from foedus.sim.executors import compiled

CLASSES = 3
WEIGHTS = np.array([0.2, 1.0, 5.0])


class Scaled(torch.nn.Module):
    """Gives its inputs, so that a test knows the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one * x


def weighted(output: Any, target: Any) -> Any:
    """A mean by weights of the user's own, which nobody but the loss knows."""
    own = 1 + abs(output[:, 0])
    each = ((output - target[:, None]) ** 2).sum(1)
    return (own * each).sum() / own.sum()


def each(output: Any, target: Any) -> Any:
    return abs(output - target[:, None]).sum(1)


TORCH: dict[str, Callable[..., Any]] = {
    "cross entropy": F.cross_entropy,
    "another label left out": functools.partial(F.cross_entropy, ignore_index=2),
    "class weights": functools.partial(F.cross_entropy, weight=torch.tensor(WEIGHTS)),
    "both, as a module": torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS), ignore_index=0),
    "smoothed": torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=0.1),
    "nll": lambda output, target: F.nll_loss(output.log_softmax(1), target),
    "per example": functools.partial(F.cross_entropy, reduction="none"),
}
LEFT_OUT = {"another label left out": 2, "both, as a module": 0}  # else torch's own
OWN: dict[str, Callable[..., Any]] = {
    "weighted": weighted,
    "each": each,
    "sum": lambda output, target: each(output, target).sum(),
    "root": lambda output, target: each(output, target).mean() ** 0.5,
}


def data(seed: int, count: int, *, left_out: int | None = None) -> Examples:
    """Targets that come in runs, so that some batches hold nothing but the label left out."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.integers(CLASSES, size=count), 5)[:count]
    if left_out is not None:
        y[rng.integers(count) :][: rng.integers(1, count + 1)] = left_out
    return Examples.of(rng.normal(size=(count, CLASSES)), y, keep_dtype=True)


@pytest.fixture(params=["one piece", "pieces"], scope="module")
def pieces(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Small batches, and outputs that fit into one piece or do not."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (jax_backend, numpy_backend, torch_backend):
            patch.setattr(module, "EVALUATION_BATCH", 4)
        if request.param == "pieces":
            for module in (trainer, numpy_backend):
                patch.setattr(module, "PIECE_BYTES", 5 * 8 * CLASSES)
        yield request.param == "pieces"


def evaluated(task: Task, examples: Examples) -> float:
    own = open_trainer(task, seed=0, device=None if isinstance(task.model, NumpyModel) else "cpu")
    return own.evaluate(own.initial(), examples)["loss"]


@pytest.mark.parametrize("name", TORCH)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40), left_out=st.booleans())
def test_torchs_means_are_exact_beyond_any_bound(
    pieces: bool, name: str, seed: int, count: int, left_out: bool
) -> None:
    label = LEFT_OUT.get(name, -100) if left_out and name != "per example" else None
    examples = data(seed, count, left_out=label)
    x, y = torch.from_numpy(examples.inputs[0]), torch.from_numpy(examples.targets)
    wanted = float(TORCH[name](x, y).mean())
    found = evaluated(Task(Scaled, TORCH[name]), examples)
    assert found == pytest.approx(wanted, rel=1e-12, nan_ok=True)


IN_JAX = JaxModel(lambda key: {"one": np.ones(())}, lambda p, x, *, train, key: p["one"] * x)


def assert_exact(model: Any, name: str, examples: Examples, *, pieces: bool) -> None:
    wanted = float(np.mean(OWN[name](examples.inputs[0], examples.targets)))
    found = evaluated(Task(model, OWN[name]), examples)
    if not pieces or name == "each":
        assert found == pytest.approx(wanted, rel=1e-12)
    elif len(examples) > 8 and name == "sum":
        assert found < wanted, "the mean of the pieces' sums, as Losses says"


@pytest.mark.parametrize("name", OWN)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_any_loss_is_exact_within_the_bound(pieces: bool, name: str, seed: int, count: int) -> None:
    assert_exact(Scaled, name, data(seed, count), pieces=pieces)


@pytest.mark.slow  # jax compiles
@pytest.mark.parametrize("name", OWN)
def test_any_loss_of_a_jax_model_is_exact_within_the_bound(pieces: bool, name: str) -> None:
    for seed in range(3):
        assert_exact(IN_JAX, name, data(seed, 11), pieces=pieces)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_numpy_models_too(pieces: bool, seed: int, count: int) -> None:
    examples = data(seed, count, left_out=-100)

    def gradient(p: Any, inputs: Any, target: Any) -> Any:
        real = target >= 0
        with np.errstate(invalid="ignore"):
            return np.float64((inputs[0].sum(1) * real).sum()) / real.sum(), {"one": np.zeros(())}

    task = Task(NumpyModel(lambda g: {"one": np.ones(())}, lambda p, x: x, gradient))
    wanted = gradient(None, examples.inputs, examples.targets)[0]
    assert evaluated(task, examples) == pytest.approx(wanted, rel=1e-9, nan_ok=True)


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 100))
def test_pieces_are_as_large_as_they_may_be(sizes: list[int], most: int) -> None:
    seen: list[int] = []

    def mean(outputs: list[Any], targets: list[Any]) -> Mean:
        output, target = np.concatenate(outputs), np.concatenate(targets)
        assert (output[:, 0] == target).all()
        seen.append(output.nbytes)
        return Mean(float(target.mean()) if len(target) else math.nan, labelled(target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "PIECE_BYTES", 8 * most)
        losses, begin, batches = Losses(mean), 0, []
        for size in sizes:
            batches.append(np.arange(begin, begin + size))
            losses.add(batches[-1][:, None], batches[-1])
            begin += size
        found = losses.result()
    called = seen if sum(seen) == 8 * begin else seen[1:]  # the first batch tells what kind of loss it is
    assert sum(called) == 8 * begin
    assert all(a + b > 8 * most for a, b in itertools.pairwise(called))
    assert found == pytest.approx(np.arange(begin).mean() if begin else math.nan, nan_ok=True)


def test_batches_that_do_not_go_together_are_pieces_of_their_own() -> None:
    """Outputs as long as the longest sequence of their batch, and outputs that are one number for a batch."""
    losses = Losses(lambda outputs, targets: Mean(float(np.concatenate(outputs).mean()), sum(map(labelled, targets))))
    for width in (3, 2, 2):
        losses.add(np.full((4, width), width), np.zeros((4, width), int))
    assert losses.result() == pytest.approx((12 * 3 + 16 * 2) / 28)
    numbers = Losses(lambda outputs, targets: Mean(float(outputs[0]), labelled(targets[0])))
    for count in (1, 3):
        numbers.add(np.array(float(count)), np.zeros(count))
    assert numbers.result() == pytest.approx(2.5)


def test_of_nothing_there_is_no_loss() -> None:
    assert math.isnan(Losses(lambda outputs, targets: Mean(1.0, 1)).result())
    assert jnp.isnan(evaluated(Task(Scaled, F.cross_entropy), data(0, 4).take(slice(0, 0))))


# --- shapes that do not go together -------------------------------------------------------------------------

TOLD = r"outputs have the shape \[4, 1\] and the targets \[4\].*every output with every target.*squeeze.*y\[:, None\]"


def one_output() -> torch.nn.Module:
    return torch.nn.Linear(CLASSES, 1)


def trained(task: Task, *, targets: tuple[int, ...] = (8,)) -> None:
    examples, spec = Examples.of(np.ones((8, CLASSES)), np.zeros(targets)), local_sgd(0.1, batch_size=4)
    own = open_trainer(task, seed=0, device="cpu")
    made = plan(spec, np.array([8]), np.array([0]), seed=0, round=1)
    own.train(own.initial(), Assignment(spec, examples, made, 1, "a"))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_outputs_that_would_be_repeated_to_fit_the_targets_are_refused(name: str, reduction: str) -> None:
    task = Task(one_output, functools.partial(getattr(F, name), reduction=reduction))
    with pytest.raises(TrainingError, match=TOLD):
        trained(task)
    with pytest.raises(ConfigurationError, match=TOLD):
        evaluated(task, Examples.of(np.ones((4, CLASSES)), np.zeros(4)))
    trained(task, targets=(8, 1))
    with pytest.raises(TrainingError, match=r"shape \[4, 1\] and the targets \[4, 1, 1\].*write y\[:, 0\]"):
        trained(task, targets=(8, 1, 1))


def test_a_value_for_each_pair_is_refused_and_shapes_that_the_loss_knows_are_not() -> None:
    with pytest.raises(TrainingError, match=TOLD):
        trained(Task(one_output, lambda output, target: (output - target) ** 2))
    trained(Task(one_output, lambda output, target: F.mse_loss(output.squeeze(-1), target)))


def test_torchs_own_refusal_is_told_with_what_to_write() -> None:
    with pytest.raises(TrainingError, match=r"must be the same as input size.*\.squeeze\(-1\)"):
        trained(Task(one_output, F.binary_cross_entropy_with_logits))


@pytest.mark.slow  # jax compiles
def test_jax_and_compiled_steps_refuse_them_too() -> None:
    in_jax = JaxModel(lambda key: {"w": np.ones((CLASSES, 1), np.float32)}, lambda p, x, *, train, key: x @ p["w"])
    task = Task(in_jax, lambda output, target: (output - target) ** 2)
    with pytest.raises(TrainingError, match=TOLD):
        trained(task)
    with pytest.raises(ConfigurationError, match=TOLD):
        evaluated(task, Examples.of(np.ones((4, CLASSES)), np.zeros(4)))
    trained(Task(in_jax, lambda output, target: (output[:, 0] - target) ** 2))
    clients = Clients.of({"a": (np.ones((4, CLASSES)), np.zeros(4))})
    job = Job(Task(one_output, F.mse_loss), fedavg(local_sgd(0.1, batch_size=4)), clients, seed=0)
    with compiled().open(job) as session, pytest.raises(ConfigurationError, match=TOLD):
        session.run(Orders(1, open_trainer(job.task, seed=0).initial(), np.array([0])))

"""The torch trainer watches a model's randomness only where there is any, and never misses it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foedus.backends import Assignment, Trained, Trainer, open_trainer
from foedus.core.batches import plan
from foedus.core.client import LocalTraining, LoopContext, local_sgd, local_training
from foedus.core.examples import Examples
from foedus.core.task import Task


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.dropout(x, 0.5, self.training))


class Late(Plain):
    """Draws only where a batch has a feature above 2, so perhaps never in a first step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.dropout(x, 0.5, self.training) if bool((x > 2).any()) else x)


def trainer(model: Callable[[], nn.Module]) -> Trainer:
    return open_trainer(Task(model=model, loss=nn.functional.cross_entropy), seed=0, device="cpu")


def train(
    with_: Trainer, client: int = 0, *, peak: float = 1.0, spec: LocalTraining | None = None
) -> Trained:
    values = np.random.default_rng(client)
    x = values.random((20, 3), dtype=np.float32)
    own = plan(spec or local_sgd(0.5, batch_size=4), np.array([20]), np.array([client]), seed=0, round=1)
    x[own.rows[3, 0], 0] = peak  # in the fourth batch
    examples = Examples.of(x, values.integers(0, 2, 20))
    work = Assignment(spec or local_sgd(0.5, batch_size=4), examples, own, 1, client)
    return with_.train(with_.initial(), work)


def equal(a: Trained, b: Trained) -> bool:
    return a.weights.vector.tobytes() == b.weights.vector.tobytes() and a.loss == b.loss


@pytest.mark.parametrize("model", [Plain, Dropping, Late])
def test_training_depends_on_nothing_that_was_trained_before(model: Callable[[], nn.Module]) -> None:
    worn = trainer(model)
    for client, peak in [(1, 1.0), (0, 3.0), (1, 3.0), (0, 1.0), (0, 3.0)]:
        assert equal(train(worn, client, peak=peak), train(trainer(model), client, peak=peak))


def test_a_draw_after_the_first_step_is_counted() -> None:
    known = trainer(Late)
    train(known, peak=3.0)  # from here on the trainer knows that the model draws
    assert equal(train(trainer(Late), peak=3.0), train(known, peak=3.0))
    assert not equal(train(trainer(Late), peak=3.0), train(trainer(Plain), peak=3.0))


@pytest.mark.parametrize("model", [Plain, Dropping, Late])
def test_the_users_own_generator_is_left_as_it_was(model: Callable[[], nn.Module]) -> None:
    state = torch.get_rng_state()
    train(trainer(model), peak=3.0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loop_of_the_users_own_draws_by_the_clients_key() -> None:
    def loop(module: nn.Module, examples: Examples, context: LoopContext) -> float:
        with torch.no_grad():
            module.get_parameter("out.weight").add_(torch.randn(2, 3))
        return 0.0

    spec = local_training(loop=loop, batch_size=4)
    first = train(trainer(Plain), 1, spec=spec)
    torch.rand(7)
    assert equal(first, train(trainer(Plain), 1, spec=spec))
    assert not equal(first, train(trainer(Plain), 2, spec=spec))

"""The torch trainer watches a model's randomness only where there is any, and never misses it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foedus.backends import Assignment, Trained, Trainer, open_trainer
from foedus.core.batches import plan
from foedus.core.client import LocalTraining, LoopContext, local_sgd, local_training
from foedus.core.compose import fedavg
from foedus.core.examples import Examples
from foedus.core.population import Clients
from foedus.core.task import Task
from foedus.core.values import SERVER, Context
from foedus.errors import TrainingError, UnsupportedOperator
from foedus.rounds.work import Executor, Job, Orders
from foedus.sim.executors import compiled, debug, vectorised


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


class Noisy(nn.Module):
    """Draws in every way that is known, before and inside a part that may be checkpointed, twice."""

    def __init__(self, how: dict[str, bool] | None) -> None:
        super().__init__()
        self.how, self.first, self.second, self.out = how, nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def part(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.tanh(self.second(x)), 0.4, self.training)
        return nn.functional.alpha_dropout(x * (1 + 0.1 * torch.empty_like(x).exponential_()), 0.2, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.first(x), 0.3, self.training)
        for _ in range(2):
            x = self.part(x) if self.how is None else checkpoint(self.part, x, **self.how)
        return self.out(x)


KEPT = {"use_reentrant": False}


@pytest.mark.parametrize("spec", [None, local_training(optimiser=lambda p: torch.optim.SGD(p, lr=0.5), batch_size=4)])
def test_activation_checkpointing_draws_the_same_again(spec: LocalTraining | None) -> None:
    plain, saving = (train(trainer(lambda how=how: Noisy(how)), spec=spec) for how in (None, KEPT))  # type: ignore[misc]
    assert equal(plain, saving)


def test_reentrant_checkpoints_too_where_torch_takes_them() -> None:
    spec = local_training(optimiser=lambda p: torch.optim.SGD(p, lr=0.5), batch_size=4)
    plain, saving = (
        train(trainer(lambda how=how: Noisy(how)), spec=spec)  # type: ignore[misc]
        for how in (None, {"use_reentrant": True})
    )
    assert equal(plain, saving)


def test_draws_that_cannot_be_made_again_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"torch.utils.checkpoint draws random numbers.*preserve_rng_state=True"):
        train(trainer(lambda: Noisy(KEPT | {"preserve_rng_state": False})))


class Saving(Plain):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def part(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(torch.tanh(self.out(x)), self.share, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


@pytest.mark.parametrize("make", [vectorised, pytest.param(compiled, marks=pytest.mark.slow)])
def test_fast_paths_pass_checkpointed_draws_by(make: Callable[[], Executor]) -> None:
    """They name what they do not know, or agree with the plain trainer; nothing in between."""
    x, y = np.random.default_rng(0).random((20, 3), dtype=np.float32), np.arange(20) % 2
    clients = Clients.of({i: (x[i::2], y[i::2]) for i in range(2)})
    for share in (0.5, 0.0):
        task = Task(lambda share=share: Saving(share), nn.functional.cross_entropy)  # type: ignore[misc]
        job = Job(task, fedavg(local_sgd(0.5, batch_size=4)), clients, seed=0)
        orders = Orders(1, open_trainer(task, seed=0, device="cpu").initial(), np.arange(2))
        found = []
        for executor in (make(), debug()):
            try:
                with executor.open(job) as session:
                    message = session.run(orders).message
            except UnsupportedOperator:
                continue
            assert message is not None
            found.append(job.algorithm.aggregator.decode({}, message, Context(0, 1, SERVER))[0])
        assert len(found) == (2 if make is compiled and not share else 1)
        np.testing.assert_allclose(found[0], found[-1], rtol=1e-4, atol=1e-7)


def trainer(model: Callable[[], nn.Module]) -> Trainer:
    return open_trainer(Task(model=model, loss=nn.functional.cross_entropy), seed=0, device="cpu")


def train(with_: Trainer, client: int = 0, *, peak: float = 1.0, spec: LocalTraining | None = None) -> Trained:
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

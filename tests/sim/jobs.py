"""Small jobs, and rounds of them to the bit: what the tests of executors in other processes share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foedus.backends import open_trainer
from foedus.core.client import local_sgd
from foedus.core.compose import fedavg
from foedus.core.linear import logistic
from foedus.core.population import Clients, Examples
from foedus.core.task import Task
from foedus.rounds.work import BUFFERS, Executor, Job, Orders, Outcome

SIZES = [5, 0, 4, 12, 3, 7, 2, 40, 9]  # ragged, with an empty client
EVERYONE = list(range(len(SIZES)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu(self.norm(self.first(x))), 0.3, self.training)
        return self.last(x)


def examples(seed: int, size: int) -> Examples:
    values = np.random.default_rng(seed)
    return Examples.of(values.random((size, 4), dtype=np.float32), values.integers(0, 3, size))


def pooled() -> Clients:
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return Clients.pooled(examples(0, sum(SIZES)), rows)


def torch_job(clients: Clients, **task: Any) -> Job:
    plain = Task(model=Tiny, loss=nn.functional.cross_entropy, **task)
    return Job(plain, fedavg(local_sgd(0.1, epochs=2, batch_size=64, momentum=0.5)), clients, seed=3)


def numpy_job(clients: Clients) -> Job:
    """A task without torch, whose workers start fast."""
    return Job(Task(model=logistic(4, 3)), fedavg(local_sgd(0.1, batch_size=4)), clients, seed=3)


def orders(this: Job, cohort: list[int], number: int = 1) -> Orders:
    return Orders(number, open_trainer(this.task, seed=0).initial(), np.array(cohort, np.int64))


def rounds(executor: Executor, this: Job, cohorts: list[list[int]]) -> list[Outcome]:
    with executor.open(this) as session:
        return [session.run(orders(this, c, number)) for number, c in enumerate(cohorts, 1)]


def bits(outcome: Outcome) -> Any:
    """All that an outcome holds, comparable to the bit, apart from the order that clients came in."""
    arrays = [m and {k: v.tobytes() for k, v in sorted(m.items())} for m in (outcome.message, outcome.buffers)]
    told = sorted(zip(outcome.clients, outcome.examples, outcome.steps, outcome.losses, strict=True))
    return arrays, told, sorted(outcome.refused), {c: v[BUFFERS].tobytes() for c, v in sorted(outcome.kept.items())}

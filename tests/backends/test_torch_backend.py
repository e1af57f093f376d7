"""The torch backend with an optimiser of the user's own: what an algorithm steers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from foedus.backends import Assignment, open_trainer
from foedus.core.batches import plan
from foedus.core.client import local_training
from foedus.core.examples import Examples
from foedus.core.task import Task


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, maximize=True),
    ],
)
def test_what_is_masked_does_not_move(optimiser: Callable[[Any], Any]) -> None:
    """Though weight decay and momentum move weights without a gradient."""
    draw = np.random.default_rng(0)
    examples = Examples.of(draw.normal(size=(12, 3)).astype("f4"), draw.normal(size=(12, 2)).astype("f4"))
    trainer = open_trainer(Task(lambda: torch.nn.Linear(3, 2), torch.nn.functional.mse_loss), seed=0, device="cpu")
    spec = local_training(optimiser=optimiser, batch_size=4)
    own = plan(spec, np.array([12]), np.array([0]), seed=0, round=1)
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32)
    start = trainer.initial()
    after = trainer.train(start, Assignment(spec, examples, own, 1, "c", mask=mask)).weights
    np.testing.assert_array_equal(after.vector != start.vector, mask == 1)

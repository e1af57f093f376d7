"""Model inversion: what does the finished model think that a class looks like?

Whoever holds the model searches for the input that it is surest about, step by step down the loss of a class, smoothed
as pictures are (Fredrikson, Jha, Ristenpart 2015, "Model inversion attacks that exploit confidence information"). What
comes out is something like the mean of a class. Where a class is one person, or one client, that is a leak; where it is
"digit 3", it is what the model is for.

This file imports torch, and is imported on use. Not here: single training examples (``inversion.py``,
``membership.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foedus.audit.inversion import Knowledge, opened_torch, variation
from foedus.audit.quality import psnr, ssim
from foedus.backends import Weights
from foedus.backends.torch_backend import same_bits
from foedus.core.checks import check_number, check_whole
from foedus.core.task import Task
from foedus.errors import ConfigurationError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Imagined:
    """An input for every class, [class, ...], and how sure the model is of each, as its loss [class].

    Example:
        >>> pictures = np.eye(4).reshape(2, 2, 4)
        >>> Imagined(inputs=pictures, losses=np.zeros(2)).likeness(pictures)["recognised"]
        1.0
    """

    inputs: Array
    losses: Array

    def likeness(self, means: Array) -> dict[str, float]:
        """How like the classes' mean examples [class, ...] they are: the mean correlation, and the share of classes to
        whose own mean each is closest by correlation (guessing: 1 / classes)."""
        found, truth = (_standardised(x.reshape(len(x), -1)) for x in (self.inputs, means))
        matrix = found @ truth.T / found.shape[1]
        right = matrix.argmax(1) == np.arange(len(matrix))
        return {"correlation": float(np.diag(matrix).mean()), "recognised": float(right.mean())}

    def closeness(self, means: Array, *, peak: float = 1.0) -> dict[str, float]:
        """PSNR and SSIM with the classes' mean examples, on average."""
        pairs = list(zip(self.inputs, means, strict=True))
        each = [(psnr(a, b, peak=peak), ssim(a, b, peak=peak)) for a, b in pairs]
        return {"psnr": float(np.mean([p for p, _ in each])), "ssim": float(np.mean([s for _, s in each]))}


def imagine(
    task: Task, weights: Weights, knowledge: Knowledge, *, steps: int = 300, rate: float = 0.05, smoothness: float = 0.1
) -> Imagined:
    """The input that a model is surest about, for every class.

    Args:
        task: with a torch model of one input, and classes.
        weights: of the finished model.
        knowledge: shape, limits and number of classes.
        steps: of Adam, from the middle of the range on.
        rate: of Adam, as a share of the range.
        smoothness: the weight of total variation, and of the squared distance from the middle.

    Raises:
        ConfigurationError: the number of classes is not given, or the task is not of that kind.

    Example:
        >>> import foedus as fd
        >>> task = fd.Task(lambda: torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy)
        >>> weights = opened_torch(task).initial()
        >>> imagine(task, weights, Knowledge(shape=(4,), classes=2), steps=5).inputs.shape
        (2, 4)
    """
    check_whole("steps", steps)
    check_number("smoothness", smoothness)
    if knowledge.classes is None:
        raise ConfigurationError("model inversion is about classes: write Knowledge(classes=10, ...), with as many")
    trainer = opened_torch(task)
    trainer.load(weights)
    trainer.module.eval()
    low, high = knowledge.limits
    inputs = torch.full((knowledge.classes, *knowledge.shape), (low + high) / 2, requires_grad=True)
    targets = torch.arange(knowledge.classes)
    optimiser = torch.optim.Adam([inputs], lr=rate * (high - low))
    with same_bits():
        for _ in range(steps):
            value = trainer.loss(trainer.module(inputs), targets) + smoothness * _rough(inputs, (low + high) / 2)
            (inputs.grad,) = torch.autograd.grad(value, [inputs])
            optimiser.step()
            with torch.no_grad():
                inputs.clamp_(low, high)
        with torch.no_grad():
            output = trainer.module(inputs)
            each = [float(trainer.loss(output[i : i + 1], targets[i : i + 1])) for i in range(len(targets))]
    return Imagined(inputs=inputs.detach().numpy(), losses=np.array(each))


def _rough(inputs: torch.Tensor, middle: float) -> torch.Tensor:
    plain = ((inputs - middle) ** 2).mean()
    return plain + variation(inputs) if inputs.ndim >= 4 else plain


def _standardised(rows: Array) -> Array:
    centred = rows - rows.mean(1, keepdims=True)
    return np.asarray(centred / (centred.std(1, keepdims=True) + 1e-12))

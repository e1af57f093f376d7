"""From a torch task to the recipe of a compiled cohort: the objective, the lowered step, the comparison with torch."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from foedus.backends.compiled import Recipe
from foedus.backends.lowering import Batch, lower, tensors_of, verify
from foedus.backends.masking import compared, objective
from foedus.backends.torch_backend import TorchTrainer, reproducibly
from foedus.backends.torch_cohort import demand_numpy_types
from foedus.backends.torch_random import counted
from foedus.core.client import LocalSGD
from foedus.core.examples import Examples
from foedus.core.task import Task

__all__ = ["recipe"]

PROBES = 8  # places among the examples where a batch is looked for whose loss is a number


@reproducibly
def recipe(
    trainer: TorchTrainer, task: Task, spec: LocalSGD, *, width: int, examples: Examples
) -> tuple[Recipe, str | None]:
    """What every client computes in batches of ``width`` rows, and why batches may not be padded (or ``None``).

    Args:
        trainer: holds the module.
        task: its loss is lowered with the module.
        spec: local training.
        width: rows of a batch.
        examples: real examples, at least one; the step is really run on them and compared with eager torch.

    Raises:
        UnsupportedOperator: names the operators of the model that have no rule, or a type of its weights.
        LoweringMismatch: the lowered step does not do what torch does.
        Exception: whatever the user's model or loss raises on the examples.
    """
    assert task.loss is not None
    demand_numpy_types(trainer.module)
    module = trainer.module.train()
    inputs, target = _probe(trainer, task, width=width, examples=examples)
    found = objective(task.loss, module, inputs=inputs, target=target)
    masked = found.masked or (lambda output, target, mask: found.exact(output, target))
    mask = torch.ones(width)
    batch = Batch(tuple(inputs), target, mask, torch.tensor([1, 2], dtype=torch.int32))
    lowered = lower(module, masked, batch)
    if found.masked and width > 1:
        mask[-1] = 0  # the comparison covers padding, too
    verify(lowered, module, masked, batch=batch._replace(mask=mask))
    frozen = {name: tensor.cpu().numpy() for name, tensor in tensors_of(module)[1].items()}
    return Recipe(lowered.step, spec, trainer.layout, trainer.buffer_layout, frozen), found.reason


def _probe(trainer: TorchTrainer, task: Task, *, width: int, examples: Examples) -> tuple[list[Tensor], Tensor]:
    """A batch to compare steps on, whose loss is a number: one of labels that are all left out would show nothing."""
    own, first = min(len(examples), width), None
    for begin in np.linspace(0, len(examples) - own, PROBES).astype(int).tolist():
        inputs, target = trainer.tensors(examples.take(begin + np.arange(width) % own))
        # A NaN in a client's data, which is refused later by name, would hide or feign faults.
        *inputs, target = (x.nan_to_num(0, 0, 0) if x.is_floating_point() else x for x in (*inputs, target))
        first = first or (inputs, target)
        with torch.no_grad(), counted(torch.tensor([1, 2], dtype=torch.int32)):
            loss = compared(task.loss, copy.deepcopy(trainer.module)(*inputs), target)  # type: ignore[arg-type]
        if loss.mean().isfinite():
            return inputs, target
    assert first is not None
    return first

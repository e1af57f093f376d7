"""Backends: numpy, torch, jax. Imported lazily; the only layer, with ``sim``'s executors, that knows a framework."""

from __future__ import annotations

from foedus.backends.trainer import Assignment, Trained, Trainer, Weights
from foedus.core.task import JaxModel, NumpyModel, Task
from foedus.errors import ConfigurationError, MissingExtra

__all__ = ["Assignment", "Trained", "Trainer", "Weights", "open_trainer"]


def open_trainer(task: Task, *, seed: int, device: str | None = None) -> Trainer:
    """The trainer for a task, of the backend that its model is written in.

    Args:
        task: the problem.
        seed: of the first weights.
        device: e.g. ``"cpu"`` or ``"cuda"``; ``None`` takes a GPU if the framework sees one.

    Raises:
        MissingExtra: the framework is not installed.
        ConfigurationError: the model cannot be trained.
    """
    if isinstance(task.model, NumpyModel):
        from foedus.backends import numpy_backend

        if device not in (None, "cpu"):
            raise ConfigurationError(f"a NumpyModel is computed on the CPU; there is no device {device!r} for it")
        return numpy_backend.build(task, seed=seed)
    if isinstance(task.model, JaxModel):
        try:
            from foedus.backends import jax_backend
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "jax", "jax", "A JaxModel") from error
        return jax_backend.build(task, seed=seed, device=device)
    try:
        from foedus.backends import torch_backend
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "torch", "torch", "A torch model") from error
    return torch_backend.build(task, seed=seed, device=device)

"""What makes a run the run that it is, piece by piece, so that a resumed one can say which piece differs.

Not here: how functions and values are digested (``core/described.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from foedus.backends import Trainer
from foedus.core import described
from foedus.core.client import Client
from foedus.core.select import Sampler
from foedus.core.task import Task


def pieces(task: Task, client: Client, sampler: Sampler, *, trainer: Trainer) -> dict[str, str]:
    """Digests of all that is written as code or as values of the user's own, by what it is called.

    Args:
        task, client, sampler: of the run.
        trainer: made of the task.
    """
    return {
        "model": described.digest((task.model, _module(trainer)), _of_model),
        "loss": digest(task.loss),
        "metrics": digest(tuple(task.metrics)),
        "local training": digest(client),
        "cohort": digest(sampler),
    }


def digest(value: Any) -> str:
    """A digest of a value of the user's own, with the functions in it."""
    return described.digest(value, _of_loss)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between the run that a folder holds and the one that was asked for, both as in ``run.json``."""
    told = [
        f"{name} is {found.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if found.get(name) != value and name not in ("rounds", "pieces", "foedus")
    ]
    there = found.get("pieces", {})
    changed = [name for name, piece in wanted["pieces"].items() if there.get(name) != piece]
    if changed and not told:
        are = "is not what it was" if len(changed) == 1 else "are not what they were"
        told = [f"the {', the '.join(changed)} {are} (of functions, code and values count, not names)"]
        python, now = (each.get("foedus", {}).get("python") for each in (found, wanted))
        told += [f"Python is {python} there and {now} here, and compiles to other code"] if python != now else []
    return "; ".join(told) or "it is told in another way, so it may be of another version of foedus"


def _module(trainer: Trainer) -> Any:
    """The torch module that a model's factory made, whatever it is made of; None for the other frameworks."""
    if trainer.backend != "torch":
        return None
    from foedus.backends.torch_backend import TorchTrainer

    return trainer.module if isinstance(trainer, TorchTrainer) else None


def _of_model(value: Any) -> object:
    return _known(value, weights=False)


def _of_loss(value: Any) -> object:
    return _known(value, weights=True)


def _known(value: Any, *, weights: bool) -> object:
    """What stands for a value of a framework; without the weights that training changes, unless these are asked for."""
    if "torch" in sys.modules:
        import torch

        if isinstance(value, torch.Tensor):
            return value.detach().cpu().to(torch.float64 if value.is_floating_point() else value.dtype).numpy()
        if isinstance(value, torch.dtype | torch.device):
            return str(value)
        if isinstance(value, torch.nn.Module):
            return _of_module(value, weights=weights)
    if "jax" in sys.modules:
        import jax

        if isinstance(value, jax.Array):
            return np.asarray(value)
    return None


def _of_module(module: Any, *, weights: bool) -> object:
    """A module's classes, settings and tensors, of all the modules in it."""
    tensors = {name: p for name, p in module.named_parameters() if weights or not p.requires_grad}
    tensors |= {name: b for name, b in module.named_buffers() if weights}
    told = [(name, type(each), _settings(each)) for name, each in module.named_modules()]
    return repr(module), told, tensors


def _settings(module: Any) -> dict[str, Any]:
    """What a module was made with, as far as it is numbers and texts: torch does not show all of it."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple) and not name.startswith("_") and name != "training"
    }

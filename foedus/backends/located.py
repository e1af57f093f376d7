"""The error of a local training that failed: whose it was, and where, whichever framework it ran in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends.trainer import Assignment
from foedus.errors import FoedusError, TrainingError


def located(error: Exception, work: Assignment, step: int | None, batch: Sequence[Any], target: Any) -> TrainingError:
    """A TrainingError with client, round, step, and the batch as numpy arrays.

    Args:
        error: what went wrong.
        work: whose training it was.
        step: the local step, counted from 0; ``None`` if it is not known.
        batch, target: arrays of any framework; ``[]`` and ``None`` if not known.
    """
    if isinstance(error, TrainingError):
        return error
    arrays = [as_numpy(b) for b in batch]
    shapes = ", ".join(f"{tuple(a.shape)} {a.dtype}" for a in arrays)
    told = f"; inputs {shapes}; targets {tuple(target.shape)} {target.dtype}" if target is not None else ""
    what = str(error) if isinstance(error, FoedusError) else f"{type(error).__name__}: {error}".rstrip(".")
    told += advice(str(error), arrays, as_numpy(target))
    told += ". The batch is on this exception as .batch" if arrays else ""
    return TrainingError(
        f"local training failed for client {work.client!r} in round {work.round}"
        f"{'' if step is None else f', step {step}'}: {what}{told}",
        client=work.client, round=work.round, step=step,
        batch=(arrays, as_numpy(target)) if arrays else None,
    )  # fmt: skip


def advice(message: str, inputs: Sequence[NDArray[Any]], target: NDArray[Any] | None) -> str:
    """What to write instead, for the faults that everybody makes once; empty for all others.

    Args:
        message: what torch, jax or Python said.
        inputs, target: the batch.

    Example:
        >>> advice("expected target dtype to be Long or Byte, but got Float", [], None)
        ". Class labels are whole numbers: write y.astype('int64')"
    """
    found = next((told for part, told in _ADVICE if part in message), "")
    kinds = ", ".join(str(x.dtype) for x in inputs)
    shapes = " and ".join(str(list(x.shape[1:])) for x in inputs)
    labels = "" if target is None or not target.size else f"{target.min()} to {target.max()}"
    return f". {found.format(kinds=kinds, shapes=shapes, labels=labels, count=len(inputs))}" if found else ""


def stray_axis(output: Sequence[int], target: Sequence[int]) -> str | None:
    """What to write where the shape of one of both has an axis of length 1 more than the other's; else ``None``.

    A loss that compares such arrays entry by entry would repeat them until they fit: every output with every target.

    Example:
        >>> stray_axis([4, 2], [4]) is None
        True
    """
    if (*target, 1) != tuple(output) and (*output, 1) != tuple(target):
        return None
    return (
        f"the model's outputs have the shape {list(output)} and the targets {list(target)}, so that the loss would "
        f"compare every output with every target. {_STRAY}"
    )


_STRAY = (
    "Where the outputs have one axis too many, end the model with .squeeze(-1), or give the targets that axis: "
    "y[:, None]. Where the targets have one too many, write y[:, 0]"
)
_ADVICE = (
    ("dtype to be Long", "Class labels are whole numbers: write y.astype('int64')"),
    ("scalar type Long", "Class labels are whole numbers: write y.astype('int64')"),
    ("result type Float can't be cast", "This loss wants targets that are floats: write y.astype('float32')"),
    ("Found dtype Long but expected Float", "This loss wants targets that are floats: write y.astype('float32')"),
    ("must be the same as input size", _STRAY),
    ("Using a target size", _STRAY),
    (
        "Target ",
        "The labels of this batch reach from {labels}: number the classes from 0, and give the model as many outputs "
        "as there are classes",
    ),
    ("index out of range in self", "A number among the inputs is not below the size of the model's embedding"),
    (
        "must have the same dtype",
        "The inputs are {kinds}, and the model computes in another type. Floats become float32 unless they are given "
        "as Examples.of(x, y, keep_dtype=True); whole numbers stay what they are: write x.astype('float32')",
    ),
    ("cannot be multiplied", "The model is made for examples of another shape than {shapes}"),
    ("positional argument", "The data has {count} input(s), and the model is called with each as one argument"),
    (
        "does not require grad",
        "The loss does not depend on the model's parameters: something is detached, or not computed by torch",
    ),
    ("has no attribute 'ndim'", "The loss must return a torch tensor: the mean over the batch, or a value per example"),
)


def as_numpy(value: Any) -> Any:
    """A numpy array of an array of any framework; ``None`` stays ``None``."""
    if value is None:
        return None
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)

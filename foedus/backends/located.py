"""The error of a local training that failed: whose it was, and where, whichever framework it ran in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from foedus.backends.trainer import Assignment
from foedus.errors import FoedusError, TrainingError


def located(
    error: Exception, work: Assignment, step: int | None, batch: Sequence[Any], target: Any
) -> TrainingError:
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
    what = str(error) if isinstance(error, FoedusError) else f"{type(error).__name__}: {error}"
    return TrainingError(
        f"local training failed for client {work.client!r} in round {work.round}"
        f"{'' if step is None else f', step {step}'}: {what}{told}. The batch is on this exception as .batch",
        client=work.client, round=work.round, step=step, batch=(arrays, as_numpy(target)),
    )  # fmt: skip


def as_numpy(value: Any) -> Any:
    """A numpy array of an array of any framework; ``None`` stays ``None``."""
    if value is None:
        return None
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)

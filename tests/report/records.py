"""Records and small runs that the tests of figures and tables share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import foedus as fd
from foedus.record import Record


def record(values: list[float | None], *, metric: str = "accuracy", folder: str = "run", **told: Any) -> Record:
    """A record whose central metric took these values; None where a round was not evaluated."""
    lines = []
    for number, value in enumerate(values, 1):
        line: dict[str, Any] = {
            "round": number, "cohort": 2, "trained": 2, "examples": 20, "steps": 4, "train_loss": 1 / number,
            "bytes_up": 1000, "bytes_down": 2000,
        }  # fmt: skip
        if value is not None:
            line["central"] = {"loss": 2.0 / number, metric: value}
        lines.append(line)
    return Record(Path(folder), {"status": "finished", "rounds": len(values)} | told, lines, [])


def task() -> fd.Task:
    """Logistic regression: trains in milliseconds and needs no framework."""
    return fd.Task(fd.logistic(4, classes=3), metrics=[fd.accuracy])


def clients(sizes: tuple[int, ...] = (12, 5, 9), seed: int = 0) -> fd.Clients:
    """Clients of unequal size, and a central test set; classes can be told apart, mostly."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(3, 4))

    def examples(count: int) -> tuple[Any, Any]:
        labels = draw.integers(0, 3, count)
        return (centres[labels] + 0.5 * draw.normal(size=(count, 4))).astype(np.float32), labels

    return fd.Clients.of({f"c{i}": examples(n) for i, n in enumerate(sizes)}, central_test=examples(60))


def settings(folder: Path, **more: Any) -> fd.Settings:
    """Quiet and quick."""
    return fd.Settings(folder=folder, progress=False, executor=fd.executors.debug(), **more)

"""Errors: one tree, drawn where it is defined, and every one survives a journey between processes."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest

from foedus import errors
from foedus.errors import FoedusError, LoweringMismatch, MissingExtra, TrainingError, UnsupportedOperator

KINDS = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, FoedusError)]
BUILT: dict[str, Any] = {
    "MissingExtra": lambda: MissingExtra("ray", "ray", "The ray executor"),
    "UnsupportedOperator": lambda: UnsupportedOperator("aten.a", "aten.b"),
    "LoweringMismatch": lambda: LoweringMismatch("the loss", 0.25, 1e-4),
}


def example(kind: type[FoedusError]) -> FoedusError:
    if kind.__name__ in BUILT:
        found: FoedusError = BUILT[kind.__name__]()
        return found
    if issubclass(kind, TrainingError):
        return kind("it failed", client="anna", round=3, step=4, batch=([np.ones(2)], np.zeros(1)))
    return kind("it failed")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_an_error_is_itself_in_another_process(kind: type[FoedusError]) -> None:
    error = example(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again).keys() == vars(error).keys()
    for name, value in vars(error).items():
        np.testing.assert_equal(getattr(again, name), value)


def test_the_tree_at_the_head_of_the_file_is_the_tree() -> None:
    """Names, order and depth as drawn."""
    drawn: list[tuple[str, str]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").split("\n"):
        found = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)", line)
        if found:
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            drawn.append((found[2], path[-2] if depth else ""))
    real = [(k.__name__, next((b.__name__ for b in k.__bases__ if issubclass(b, FoedusError)), "")) for k in KINDS]
    assert sorted(drawn) == sorted(real)


def test_they_can_be_caught_by_what_python_calls_them() -> None:
    for name, usual in (
        ("ConfigurationError", ValueError), ("MissingExtra", ImportError), ("DataError", ValueError),
        ("DataNotFound", FileNotFoundError), ("TrainingError", RuntimeError), ("SumOverflow", OverflowError),
        ("StorageError", OSError), ("WorkerDied", RuntimeError),
    ):  # fmt: skip
        assert issubclass(getattr(errors, name), usual)
        assert issubclass(getattr(errors, name), FoedusError)

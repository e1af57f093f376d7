"""Names of functions, by which runs are told apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from foedus.core.checks import named


def over(value: Any) -> Callable[[int], Any]:
    return lambda i: (i, value)


def mostly(i: int, share: float = 0.5) -> bool:
    return str(i) in {"a", "b", "c"} or share > 0.1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda i: i + 1, lambda i: i + 2),
        (lambda i: np.sin(i), lambda i: np.cos(i)),
        (lambda i, k=1: i, lambda i, k=2: i),
        (lambda i: [j + 1 for j in range(i)], lambda i: [j + 2 for j in range(i)]),
        (over(3), over(4)),
        (over(np.arange(3)), over(np.arange(4))),
        (over((1, "a")), over((1, "b"))),
        (over(lambda: 1), over(lambda: 2)),
    ],
)
def test_functions_of_one_name_are_told_apart(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert named(one).split()[0] == named(other).split()[0] == "<lambda>"
    assert named(one) != named(other)


def test_the_same_function_is_named_alike_wherever_it_is() -> None:
    assert named(over(np.arange(3))) == named(over(np.arange(3)))
    assert named(over(object())) == named(over(object()))
    assert named(np.sin) == "sin"
    assert named(partial(mostly, 1)) == named(partial(mostly, 1)) != named(partial(mostly, 2))
    code = f"exec(open({__file__!r}).read())\nprint(named(mostly))"  # with another order of sets of texts
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == named(mostly)

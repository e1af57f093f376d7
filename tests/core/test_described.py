"""Digests of functions and values: what they notice, and that they are the same in another process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from foedus.core.described import digest

PROGRAM = """
import numpy as np
from foedus.core.described import digest
SCALE = 3.0
class Net:
    width = 4
    def forward(self, x): return x in {"a", "b", "c"} and self.width
def outer(k):
    def loss(o, y, *, mode={"x": 1}): return SCALE * k * helper(o)
    return loss
def helper(o): return o + 1
print(digest((outer(2), Net, np.arange(3), {1, 2}, {"b": 1, "a": 2}, lambda: Net())))
"""


def test_another_process_and_another_order_of_hashes_give_the_same() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert len(found.pop()) == 17


def scaled(by: float) -> Callable[[float], float]:
    return lambda x: by * x


@dataclass
class Settings:
    rate: float


class Focal:
    def __init__(self, gamma: float) -> None:
        self.gamma, self.calls = gamma, 0

    def __call__(self, x: float) -> float:
        self.calls += 1
        return float(x**self.gamma)


def net(constant: int, *, within: int = 0) -> type:
    class Net:
        def forward(self, x: int) -> int:
            return x + constant

        @property
        def inner(self) -> int:
            return within

    return Net


def counted(seen: list[float]) -> Callable[[float], float]:
    def loss(x: float) -> float:
        seen.append(x)
        return x

    return loss


PAIRS: dict[str, tuple[Any, Any]] = {
    "constants": (lambda r: 0.1 / r, lambda r: 0.2 / r),
    "closures": (scaled(1.0), scaled(2.0)),
    "arguments of a partial": (functools.partial(scaled, by=0.1), functools.partial(scaled, by=0.9)),
    "defaults": (lambda x, k=1: x, lambda x, k=2: x),
    "functions called": (lambda x: abs(x), lambda x: round(x)),
    "methods": (net(1), net(2)),
    "properties": (net(1), net(1, within=2)),
    "fields": (Settings(1.0), Settings(2.0)),
    "attributes": (Focal(1.0), Focal(2.0)),
    "lists that nobody writes to": (lambda v=[1]: v, lambda v=[2]: v),
    "arrays": (np.arange(3), np.arange(3)[::-1]),
    "dtypes": (np.arange(3), np.arange(3.0)),
    "kinds": (1, True),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_is_noticed(name: str) -> None:
    one, other = PAIRS[name]
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


def test_what_changes_as_it_runs_is_not_noticed() -> None:
    seen: list[float] = []
    loss, focal = counted(seen), Focal(2.0)
    before = digest((loss, focal))
    loss(1.0)
    focal(1.0)
    assert seen
    assert digest((loss, focal)) == before


def test_what_holds_itself_has_an_end() -> None:
    def again(n: int) -> int:
        return again(n - 1) if n else 0

    endless: list[Any] = [1]
    endless.append(endless)
    assert len(digest(again)) == len(digest(endless)) == 16

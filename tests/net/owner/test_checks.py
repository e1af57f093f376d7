"""Checks of data: every one lets pass and refuses, and says nothing of the values."""

from __future__ import annotations

import re

import numpy as np
import pytest

from foedus.core.examples import Examples
from foedus.net.owner.checks import examine
from foedus.net.owner.rules import _KEYS, parse, refused

GOOD = Examples.of(np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], np.float32), [0, 1, 1])

CHECKS = {
    "inputs": ('["float32[2]"]', GOOD, Examples.of(np.zeros((3, 3)), [0, 1, 1]), r"inputs are float32\[3\]; wanted"),
    "target": ('"int64"', GOOD, Examples.of(np.zeros((3, 2)), [0.5, 1.0, 1.0]), "targets are float32; wanted: int64"),
    "lowest": ("0.0", GOOD, Examples.of([[-1.0, 0.0], [0.0, -2.0]], [0, 1]), "2 of 2 examples have an input below 0"),
    "highest": ("5", GOOD, Examples.of([[1.0, 6.0], [0.0, 2.0]], [0, 1]), "1 of 2 examples have an input above 5"),
    "labels": ("[0, 1]", GOOD, Examples.of([[1.0], [0.0]], [1, 2]), "label 0 is missing and there are 1 labels"),
    "finite": ("true", GOOD, Examples.of([[1.0], [np.nan]], [np.inf, 2.0]), "2 of 2 examples have missing"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_lets_pass_and_refuses(check: str) -> None:
    value, good, bad, told = CHECKS[check]
    checks = parse(f"[checks]\n{check} = {value}").checks
    assert refused(examine(checks, good)) == ()
    (reason,) = refused(examine(checks, bad))
    assert re.search(told, reason)
    assert f"(rules: checks.{check})" in reason


def test_there_is_a_test_for_each() -> None:
    assert set(CHECKS) == set(_KEYS["checks"])


def test_a_check_that_is_switched_off_lets_pass() -> None:
    bad = Examples.of([[np.nan]], [5])
    assert refused(examine(parse("[checks]\nfinite = false").checks, bad)) == ()
    assert refused(examine(parse("").checks, bad))

"""Checks that data must pass before it may train: kinds, ranges, labels. They run where the data is, and say only
what is wrong, with numbers of examples; never a value of the data itself leaves with them.

Not here: how many examples (``rules.py``), cleaning data.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from foedus.core.examples import Array, Examples
from foedus.net.owner.rules import Checks, Finding

__all__ = ["examine", "kind"]


def kind(array: Array) -> str:
    """Kind and shape of one example's array, as the rules write it.

    Example:
        >>> kind(np.zeros((5, 13), np.float32)), kind(np.zeros(5, np.int64))
        ('float32[13]', 'int64')
    """
    return f"{array.dtype}{list(array.shape[1:])}" if array.ndim > 1 else str(array.dtype)


def examine(checks: Checks, examples: Examples) -> list[Finding]:
    """What each check says of the data.

    Example:
        >>> data = Examples.of([[0.5], [2.0]], [0, 1])
        >>> [f.told for f in examine(Checks(highest=1.0), data) if not f.passes]
        ['1 of 2 examples have an input above 1']
    """
    return [*_kinds(checks, examples), *_ranges(checks, examples), *_labels(checks, examples)]


def _kinds(checks: Checks, examples: Examples) -> Iterator[Finding]:
    if checks.inputs is not None:
        found = tuple(kind(array) for array in examples.inputs)
        same = _plain(found) == _plain(checks.inputs)
        yield Finding("checks.inputs", same, f"inputs are {', '.join(found)}; wanted: {', '.join(checks.inputs)}")
    if checks.target is not None:
        target = kind(examples.targets)
        yield Finding(
            "checks.target",
            _plain([target]) == _plain([checks.target]),
            f"targets are {target}; wanted: {checks.target}",
        )


def _ranges(checks: Checks, examples: Examples) -> Iterator[Finding]:
    arrays = [array.reshape(len(examples), -1) for array in examples.inputs]
    if checks.finite:
        floats = [a for a in (*arrays, examples.targets.reshape(len(examples), -1)) if a.dtype.kind == "f"]
        bad = _count([~np.isfinite(a) for a in floats], len(examples))
        yield Finding("checks.finite", not bad, f"{bad} of {len(examples)} examples have missing or infinite numbers")
    if checks.lowest is not None:
        low = _count([a < checks.lowest for a in arrays], len(examples))
        yield Finding(
            "checks.lowest", not low, f"{low} of {len(examples)} examples have an input below {checks.lowest:g}"
        )
    if checks.highest is not None:
        high = _count([a > checks.highest for a in arrays], len(examples))
        yield Finding(
            "checks.highest", not high, f"{high} of {len(examples)} examples have an input above {checks.highest:g}"
        )


def _labels(checks: Checks, examples: Examples) -> Iterator[Finding]:
    if checks.labels is None:
        return
    there = set(np.unique(examples.targets).tolist())
    missing, others = sorted(set(checks.labels) - there), len(there - set(checks.labels))
    told = [f"label {', '.join(f'{label:g}' for label in missing)} is missing"] if missing else []
    told += [f"there are {others} labels that are not listed"] if others else []
    yield Finding("checks.labels", not told, " and ".join(told) or "all labels are there")


def _count(masks: list[Array], length: int) -> int:
    """In how many examples any of the masks [example, ...] is true."""
    found = np.zeros(length, bool)
    for mask in masks:
        found |= mask.any(axis=1)
    return int(found.sum())


def _plain(kinds: object) -> list[str]:
    assert isinstance(kinds, tuple | list)
    return ["".join(str(kind).split()) for kind in kinds]

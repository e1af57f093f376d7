"""Checks of the numbers that a user writes, with one wording.

Not here: checks of data (``core/examples.py``).
"""

from __future__ import annotations

import math
from types import BuiltinFunctionType
from typing import Any

import numpy as np

from foedus.core.described import digest
from foedus.errors import ConfigurationError


def whole(value: Any, *, least: int) -> bool:
    """Whether a value is a whole number of at least ``least``; Python's and numpy's are, ``True`` is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def check_whole(name: str, value: Any, *, least: int = 1, most: int | None = None, also: str = "") -> None:
    """Refuse all but whole numbers of at least ``least``, and at most ``most`` if that is given.

    Args:
        name: of the argument, for the message.
        value: what was written.
        least: the smallest that will do.
        most: the largest.
        also: what may be written besides, for the message.

    Raises:
        ConfigurationError: it is something else; says what.

    Example:
        >>> check_whole("epochs", 3)
        >>> check_whole("epochs", 2.5)
        Traceback (most recent call last):
        foedus.errors.ConfigurationError: epochs must be a whole number of at least 1, not 2.5
    """
    if not whole(value, least=least) or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigurationError(f"{name} must be a whole number {wanted}{also}, not {value!r}")


def check_number(name: str, value: Any, *, also: str = "", below: float = math.inf, above: bool = False) -> None:
    """Refuse all but numbers from 0 to, but not including, ``below``.

    Args:
        name: of the argument, for the message.
        value: what was written.
        also: what may be written besides, for the message.
        below: e.g. 1 for a share.
        above: whether 0 itself is refused.

    Raises:
        ConfigurationError: it is something else; says what.

    Example:
        >>> check_number("lr", 0.1)
        >>> check_number("lr", "0.1")
        Traceback (most recent call last):
        foedus.errors.ConfigurationError: lr must be a number of at least 0; not '0.1'
    """
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not 0 <= value < below or (above and not value):
        least = "above 0" if above else "of at least 0"
        bound = f"{least} and below {below:g}" if below < math.inf else least
        raise ConfigurationError(f"{name} must be a number {bound}{also}; not {value!r}")


def named(function: Any) -> str:
    """A function's name and eight digits that tell another function of that name apart, for labels: a run that is
    resumed compares them. See :func:`foedus.core.described.digest`.

    Example:
        >>> named(len)
        'len'
        >>> named(lambda i: i % 2) == named(lambda i: i % 3)
        False
    """
    name = str(getattr(function, "__name__", None) or type(function).__name__)
    return name if isinstance(function, BuiltinFunctionType | np.ufunc) else f"{name} {digest(function)[:8]}"

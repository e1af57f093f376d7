"""Checks of the numbers that a user writes, with one wording.

Not here: checks of data (``core/examples.py``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from foedus.errors import ConfigurationError


def check_number(
    name: str, value: Any, *, also: str = "", below: float = math.inf, above: bool = False
) -> None:
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


def check_whole(name: str, value: Any, *, least: int = 0, most: int | None = None) -> None:
    """Refuse all but whole numbers from ``least``, to ``most`` if that is given.

    Args:
        name: of the argument, for the message.
        value: what was written.
        least: the smallest that is let pass.
        most: the largest.

    Raises:
        ConfigurationError: it is something else; says what.

    Example:
        >>> check_whole("attackers", 1.5)
        Traceback (most recent call last):
        foedus.errors.ConfigurationError: attackers must be a whole number of at least 0; not 1.5
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigurationError(f"{name} must be a whole number {wanted}; not {value!r}")

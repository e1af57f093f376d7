"""Checks of the numbers that a user writes, with one wording.

Not here: checks of data (``core/examples.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from types import CodeType
from typing import Any

import numpy as np

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
    """A function's name and, if it is written in Python, eight digits that tell another function of that name apart.

    They are a digest of its code, its defaults and what it closes over, as far as those are numbers, texts, arrays
    or functions. A run that is resumed compares them. The values of global names are not covered.

    Example:
        >>> named(len)
        'len'
        >>> named(lambda i: i % 2) == named(lambda i: i % 3)
        False
    """
    name = getattr(function, "__name__", None) or type(function).__name__
    if not isinstance(getattr(function, "__code__", None), CodeType):
        return str(name)
    digest = hashlib.sha256()
    for part in _of_function(function):
        digest.update(part)
    return f"{name} {digest.hexdigest()[:8]}"


def _of_function(function: Any) -> Iterator[bytes]:
    yield from _of_code(function.__code__)
    cells = map(_held, function.__closure__ or ())
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *cells):
        yield from _of_value(value, function)


def _of_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        yield from _of_code(constant) if isinstance(constant, CodeType) else _of_value(constant, None)


def _of_value(value: Any, within: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield repr((value.shape, value.dtype.str)).encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _of_value(one, within)
    elif isinstance(value, frozenset | set):
        yield repr(sorted(map(repr, value))).encode()  # their own order differs between processes
    elif isinstance(value, int | float | complex | str | bytes | np.generic | type(None) | type(...)):
        yield repr(value).encode()
    elif isinstance(getattr(value, "__code__", None), CodeType) and value is not within:
        yield from _of_code(value.__code__)
    else:
        yield type(value).__qualname__.encode()


def _held(cell: Any) -> Any:
    """What a cell of a closure holds; nothing, where the variable has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None

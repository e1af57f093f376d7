"""Turbofan engines run to failure (NASA C-MAPSS): how many cycles has an engine left?

Four sub-sets that differ in operating conditions and in ways to fail:

    subset   conditions   faults   training engines   test engines
    1        1            1        100                100
    2        6            1        260                259
    3        1            2        100                100
    4        6            2        249                248

Every engine is a client. Its series of 24 columns (3 settings, 21 sensors) is cut into windows; the
target of a window is the remaining useful life after its last cycle, capped: while an engine is healthy
nothing in its sensors tells 200 cycles from 300. Test engines stop before they fail, and count once each,
by their last window and NASA's figure for what they had left.

Source: A. Saxena, K. Goebel, D. Simon, N. Eklund, "Damage propagation modeling for aircraft engine
run-to-failure simulation", PHM 2008. The cap: F. Heimes, "Recurrent neural networks for remaining useful
life estimation", PHM 2008.

Not here: scaling. Values are as measured; `foedus.data.federated_scaling` scales them without
pooling, per operating condition with ``regime=turbofan_condition`` for sub-sets 2 and 4.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import Examples
from foedus.data.dataset import Dataset
from foedus.data.sources import read
from foedus.errors import ConfigurationError

__all__ = ["turbofan", "turbofan_condition"]

Floats = NDArray[np.float32]

_COLUMNS: Final = (*(f"setting {i}" for i in range(1, 4)), *(f"sensor {i}" for i in range(1, 22)))
_ALTITUDES: Final = np.array([0, 10, 20, 25, 35, 42], np.float32)  # thousand feet, the six conditions


def turbofan(
    subset: int = 1, *, window: int = 30, cap: float = 125, stride: int = 1, cap_test: bool = False
) -> Dataset:
    """Windows of engine sensors, float32 [n, window, 24], and cycles left, float32 [n].

    Natural clients: ``turbofan(1).clients()`` gives one per engine. The test set has one window per
    test engine. A series shorter than the window is lengthened at its start by its first cycle.

    Args:
        subset: 1 to 4, see the table of the module.
        window: cycles that the model sees.
        cap: targets above it count as ``cap``; ``float("inf")`` for none.
        stride: cycles between the ends of two training windows.
        cap_test: whether NASA's figures for the test engines are capped as well. Published errors do
            it either way; say which.

    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> turbofan(1).clients()  # doctest: +SKIP
        Clients(100 clients, 17,731 examples, resident)
    """
    if subset not in (1, 2, 3, 4):
        raise ConfigurationError(f"The turbofan sub-sets are numbered 1 to 4 (FD001 to FD004), not {subset!r}.")
    if window < 1 or stride < 1 or not cap > 0:
        raise ConfigurationError(f"window, stride and cap must be positive: {window}, {stride}, {cap}.")
    runs = _engines(f"turbofan/train_FD00{subset}.txt.gz")
    pieces = [_windows(run, window, stride) for run in runs]
    lives = [_cycles_left(len(run), window, stride) for run in runs]
    left = np.array(read(f"turbofan/RUL_FD00{subset}.txt").split(), np.float32)
    stopped = _engines(f"turbofan/test_FD00{subset}.txt.gz")
    last = np.stack([_lengthened(run, window)[-window:] for run in stopped])
    return Dataset(
        f"turbofan FD00{subset}",
        Examples.of(np.concatenate(pieces), np.minimum(np.concatenate(lives), cap)),
        Examples.of(last, np.minimum(left, cap) if cap_test else left),
        columns=_COLUMNS,
        groups={"engine": np.repeat(np.arange(1, len(runs) + 1), [len(p) for p in pieces])},
        about=f"Saxena, Goebel, Simon, Eklund, C-MAPSS, PHM 2008; life capped at {cap:g} cycles",
    )


def turbofan_condition(x: NDArray[Any]) -> NDArray[np.int64]:
    """Which of the six operating conditions a row of measurements was taken in, 0 .. 5.

    Told by the first setting, the altitude: 0, 10, 20, 25, 35 or 42 thousand feet, give or take noise.

    Args:
        x: [..., 24] as `turbofan` gives it.

    Returns:
        int64 [...].

    Example:
        >>> turbofan_condition(np.array([[0.1] * 24, [19.9] * 24, [42.0] * 24])).tolist()
        [0, 2, 5]
    """
    nearest: NDArray[np.int64] = np.abs(x[..., 0, None] - _ALTITUDES).argmin(axis=-1)
    return nearest


def _engines(path: str) -> list[Floats]:
    """One series per engine, [cycle, column], in the order of their numbers."""
    table = np.array([line.split() for line in read(path).decode().splitlines()], np.float64)
    starts = np.flatnonzero(np.diff(table[:, 0], prepend=np.nan) != 0)
    return np.split(table[:, 2:].astype(np.float32), starts[1:])


def _lengthened(run: Floats, window: int) -> Floats:
    missing = max(window - len(run), 0)
    return np.concatenate([np.repeat(run[:1], missing, axis=0), run])


def _windows(run: Floats, window: int, stride: int) -> Floats:
    """All windows of a series, the last one ending at its last cycle: [window number, cycle, column]."""
    run = _lengthened(run, window)
    views = np.lib.stride_tricks.sliding_window_view(run, window, axis=0)  # [start, column, cycle]
    return np.ascontiguousarray(views[(len(views) - 1) % stride :: stride].transpose(0, 2, 1))


def _cycles_left(length: int, window: int, stride: int) -> Floats:
    """Cycles left after each of `_windows`; after the last cycle an engine has none left."""
    left = np.arange(max(length - window, 0), -1, -1, dtype=np.float32)
    return left[(len(left) - 1) % stride :: stride]

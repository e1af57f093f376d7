"""Preprocessing that pools nothing: scaling and filling in from sums of statistics, or client by client.

Every client turns its training examples into a vector of statistics (counts, sums, histograms). The vectors
are added up by an `Aggregator`, the same kind that adds up model updates, so whatever protects updates
protects statistics, and only the sums are looked at. From them come frozen values, `Scaling` and
`Filling`, that every client applies on its own: ``clients.map(scaling.apply)``.

Sums are exact (`core/aggregate.py`), and two passes are made, first means, then squares about the means:
federated scaling equals the scaling of pooled data to 12 digits. To use the fixed point well, each column is
divided by a power of 16 above its largest magnitude, found from a sum of histograms of exponents, before values
(and again before squares) are summed.

What is revealed: the sums. With one client they are that client's statistics, and a median found by
histograms comes close to a value that somebody has.

Not here: categories as text (`vocabulary.py`), and noise for differential privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, mean
from foedus.core.parts import Fit, Function
from foedus.core.population import Clients, Examples
from foedus.core.values import SERVER, Context, Update
from foedus.errors import ConfigurationError, DataError
from foedus.tree import Layout

__all__ = [
    "Filling",
    "Scaling",
    "added",
    "federated_mean_filling",
    "federated_median_filling",
    "federated_scaling",
    "federated_sum",
    "own_mean_filling",
    "own_scaling",
]  # fmt: skip

Floats: TypeAlias = NDArray[np.float64]
Regime: TypeAlias = Callable[[NDArray[Any]], NDArray[np.int64]]

_STEP: Final = 4  # scales are powers of 2**4
_LOWEST: Final = -64  # magnitudes below 2**-64 are as good as 0
_SCALES: Final = (128 - _LOWEST) // _STEP + 1
_ROUNDING: Final = 1e-13  # of the largest magnitude: a spread below it is none
_BINS: Final = 256
_PASSES: Final = 4  # of the histogram: 256**4 bins over the range


class Scaling(NamedTuple):
    """Column means and standard deviations, and what to do with them.

    A column that does not vary (or was never seen) is only shifted. Missing values stay missing.

    Attributes:
        mean, std: float64 [regime, column].
        input: which of the model's inputs is scaled.
        axis: the axis of that input whose entries are scaled each by itself, with the examples' as 0.
        regime: rows of the input [..., column] -> the row of ``mean`` to use, int64 [...]; None: always 0.

    Example:
        >>> scaling = Scaling(np.array([2.0]), np.array([4.0]))
        >>> scaling.apply(Examples.of([[6.0]], [1])).inputs[0].tolist()
        [[1.0]]
    """

    mean: Floats
    std: Floats
    input: int = 0
    axis: int = -1
    regime: Regime | None = None

    def apply(self, examples: Examples) -> Examples:
        """The examples with (x - mean) / std in place of x; computed in float64, kept in x's dtype.

        Whole numbers become float32.
        """
        x = np.moveaxis(examples.inputs[self.input], self.axis, -1)
        which = 0 if self.regime is None else self.regime(x)
        scaled = (x - self.mean[which]) / self.std[which]
        return _with_input(examples, self.input, np.moveaxis(scaled, -1, self.axis))


class Filling(NamedTuple):
    """A value for each column, put where one is missing (NaN).

    Attributes:
        values: float64 [column]; NaN leaves what is missing in that column as it is.
        input: which of the model's inputs is filled in.
        axis: the axis of that input that the columns lie on, with the examples' as 0.

    Example:
        >>> filling = Filling(np.array([4.0]))
        >>> filling.apply(Examples.of([[1.0], [np.nan]], [0, 1])).inputs[0].tolist()
        [[1.0], [4.0]]
    """

    values: Floats
    input: int = 0
    axis: int = -1

    def apply(self, examples: Examples) -> Examples:
        """The examples with no value missing in that input."""
        x = np.moveaxis(examples.inputs[self.input], self.axis, -1)
        filled = np.where(np.isnan(x), self.values, x)
        return _with_input(examples, self.input, np.moveaxis(filled, -1, self.axis))


def federated_scaling(
    clients: Clients,
    *,
    input: int = 0,
    axis: int = -1,
    regime: Regime | None = None,
    regimes: int = 1,
    aggregator: Aggregator | None = None,
) -> Scaling:
    """The mean and standard deviation of every column over all clients' training examples.

    Missing values (NaN) are left out. Four sums are made: exponents of the values, sums, exponents of the
    distances from the mean, and their squares.

    Args:
        input: which of the model's inputs; see `Scaling` for this, ``axis`` and ``regime``.
        axis: -1 for tables and series [example, (cycle,) column]; 1 for images [example, channel, h, w].
        regime: scale apart what this function tells apart; e.g. `turbofan_condition`.
        regimes: how many regimes there are.
        aggregator: adds the statistics up; default ``mean(weighted=False)``.

    Raises:
        DataError: for infinite values, naming the client.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [3.0]], [0, 0]), "b": ([[5.0]], [0])})
        >>> scaling = federated_scaling(clients)
        >>> scaling.mean.item(), round(scaling.std.item(), 3)
        (3.0, 1.633)
        >>> scaled = clients.map(scaling.apply)
    """
    columns = _Columns(input, axis, regime, regimes)
    moments = _moments(clients, columns, _adder(aggregator))
    return Scaling(moments.mean, moments.std, input, axis, regime)


def federated_mean_filling(
    clients: Clients, *, input: int = 0, axis: int = -1, aggregator: Aggregator | None = None
) -> Filling:
    """Fill in the mean of each column over all clients' training examples; 0 where nobody has any.

    Arguments and errors as for `federated_scaling`.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [np.nan]], [0, 1]), "b": ([[5.0]], [1])})
        >>> federated_mean_filling(clients).values.tolist()
        [3.0]
    """
    moments = _moments(clients, _Columns(input, axis), _adder(aggregator))
    return Filling(moments.mean[0], input, axis)


def federated_median_filling(
    clients: Clients,
    *,
    quantile: float = 0.5,
    input: int = 0,
    axis: int = -1,
    aggregator: Aggregator | None = None,
) -> Filling:
    """Fill in the median (or another quantile) of each column; 0 where nobody has any.

    Found by histograms of 256 bins, each of the four passes within the bin that the median was in
    before. The value is the middle of the last bin: right to 2**-32 of the column's largest magnitude,
    rounded up to a power of 16. Of an even number of values the lower median is meant.

    Args:
        quantile: in (0, 1): the smallest value with at least that share of values at or below it.
        input, axis, aggregator: as for `federated_scaling`.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [np.nan]], [0, 1]), "b": ([[2.0], [9.0]], [1, 0])})
        >>> federated_median_filling(clients).values.round(2).tolist()
        [2.0]
    """
    if not 0 < quantile < 1:
        raise ConfigurationError(f"quantile must lie between 0 and 1, and is {quantile}.")
    columns, add = _Columns(input, axis), _adder(aggregator)
    scale = _scales(clients, columns, add)
    count = federated_sum(clients, partial(_counts, columns), aggregator=add)
    low, width, rank = -scale[0], 2 * scale[0], np.maximum(np.ceil(quantile * count), 1)
    for _ in range(_PASSES):
        statistic = partial(_histogram, columns, low, width)
        below = federated_sum(clients, statistic, aggregator=add).reshape(-1, _BINS).cumsum(axis=1)
        found = np.minimum((below < rank[:, None]).sum(axis=1), _BINS - 1)
        rank = rank - np.where(found > 0, below[np.arange(len(found)), found - 1], 0)
        width = width / _BINS
        low = low + found * width
    return Filling(np.where(count > 0, low + width / 2, 0.0), input, axis)


def own_scaling(*, input: int = 0, axis: int = -1) -> Fit:
    """Scaling within each client by its own training examples: ``clients.map_fitted(own_scaling())``.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [3.0]], [0, 1]), "b": ([[50.0], [70.0]], [1, 0])})
        >>> clients.map_fitted(own_scaling()).train(1).inputs[0].tolist()
        [[-1.0], [1.0]]
    """
    return partial(_fit_scaling, _Columns(input, axis))


def own_mean_filling(*, input: int = 0, axis: int = -1) -> Fit:
    """Filling in each client's own column means; 0 in columns of which it has no value at all.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [np.nan]], [0, 1])})
        >>> clients.map_fitted(own_mean_filling()).train(0).inputs[0].tolist()
        [[1.0], [1.0]]
    """
    return partial(_fit_filling, _Columns(input, axis))


def federated_sum(
    clients: Clients,
    statistic: Callable[[Examples], Floats],
    *,
    aggregator: Aggregator | None = None,
) -> Floats:
    """The sum over all clients of a statistic of their training examples, float64 [entry].

    Args:
        statistic: Examples -> float64 [entry], of magnitudes below 2**42 in sum.
        aggregator: adds up; by default exactly.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [3.0]], [0, 1]), "b": ([[5.0]], [1])})
        >>> federated_sum(clients, lambda e: np.array([len(e), e.targets.sum()], float))
        array([3., 2.])
    """
    if not isinstance(clients, Clients):
        raise ConfigurationError(
            f"statistics over clients are of a foedus.Clients, and this is of type {type(clients).__name__}. Deal the "
            "data out first: dataset.partition(foedus.data.iid(10)), where foedus.data.from_torch(...) and "
            "foedus.data.from_arrays(x, y) make a dataset of what you have"
        )
    return added((_asked(clients, statistic, i) for i in range(len(clients))), aggregator)


def _asked(clients: Clients, statistic: Callable[[Examples], Floats], position: int) -> Floats:
    examples = clients.train(position)
    try:
        return statistic(examples)
    except DataError as error:
        raise DataError(f"In the data of client {clients.ids[position]!r}: {error}") from None


def added(vectors: Iterable[Floats], aggregator: Aggregator | None = None) -> Floats:
    """The sum of one vector per client, float64 [entry], by an aggregator (default: exactly)."""
    adder = _adder(aggregator)
    context, total, count, size = Context(seed=0, round=0, client=0), None, 0, 0
    for vector in vectors:
        context = context._replace(client=count, size=len(vector))
        message = adder.admit(adder.encode(Update(vector, 1.0), context), context)
        total = message if total is None else adder.merge(total, message)
        count, size = count + 1, len(vector)
    if total is None:
        raise DataError("There is no client to sum over.")
    state = adder.init(Layout.of({"statistics": np.zeros(size)}))
    average, _ = adder.decode(state, total, context._replace(client=SERVER))
    return np.asarray(average, np.float64) * count


class _Columns(NamedTuple):
    """Which numbers of an example belong to which column."""

    input: int = 0
    axis: int = -1
    regime: Regime | None = None
    regimes: int = 1

    def read(self, examples: Examples) -> Floats:
        """The values, float64 [row, column]."""
        x = self.last(examples)
        rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
        if np.isinf(rows).any():
            raise DataError("An input has infinite values; replace them by NaN (missing) or by a number.")
        return rows

    def by_regime(self, examples: Examples) -> Iterator[tuple[int, Floats]]:
        """Each regime that occurs, with its rows, float64 [row, column]."""
        rows = self.read(examples)
        if self.regime is None:
            yield from [(0, rows)] if len(rows) else []
            return
        which = self.regime(self.last(examples)).reshape(-1)
        if which.size and (which.min() < 0 or which.max() >= self.regimes):
            raise ConfigurationError(
                f"regime() gave numbers from {which.min()} to {which.max()}, and regimes={self.regimes}."
            )
        yield from ((int(k), rows[which == k]) for k in np.unique(which))

    def last(self, examples: Examples) -> NDArray[Any]:
        """The input with its columns on the last axis."""
        if not -len(examples.inputs) <= self.input < len(examples.inputs):
            raise ConfigurationError(f"input={self.input}, and the examples have {len(examples.inputs)} inputs.")
        return np.moveaxis(examples.inputs[self.input], self.axis, -1)


class _Moments(NamedTuple):
    mean: Floats  # [regime, column]
    std: Floats


def _moments(clients: Clients, columns: _Columns, add: Aggregator) -> _Moments:
    scale = _scales(clients, columns, add)
    first = federated_sum(clients, partial(_first, columns, scale), aggregator=add)
    count, total = first.reshape(2, *scale.shape)
    count = np.maximum(count, 1)
    centre = total / count * scale
    # Deviations may be far smaller than values (pressures of 2388.0 to 2388.1), hence a scale of their own.
    unit = _scales(clients, columns, add, centre)
    squares = federated_sum(clients, partial(_second, columns, unit, centre), aggregator=add)
    spread = np.sqrt(squares.reshape(scale.shape) / count) * unit
    return _Moments(centre, np.where(spread > _ROUNDING * scale, spread, 1.0))


def _scales(clients: Clients, columns: _Columns, add: Aggregator, centre: Floats | None = None) -> Floats:
    """A power of 16 above every magnitude (distance from the centre) of each column, [regime, column].

    1 where there is none.
    """
    seen = federated_sum(clients, partial(_exponents, columns, centre), aggregator=add)
    taken = seen.reshape(_SCALES, columns.regimes, -1) > 0.5
    highest = _SCALES - 1 - np.argmax(taken[::-1], axis=0)
    return np.where(taken.any(axis=0), np.ldexp(1.0, _LOWEST + _STEP * highest), 1.0)


def _exponents(columns: _Columns, centre: Floats | None, examples: Examples) -> Floats:
    """One-hot over the scales for each regime and column that has a value: [scale * regime * column]."""
    width = columns.last(examples).shape[-1]
    seen = np.zeros((_SCALES, columns.regimes, width))
    for regime, rows in columns.by_regime(examples):
        known = ~np.isnan(rows).all(axis=0)
        largest = np.nan_to_num(np.abs(rows if centre is None else rows - centre[regime])).max(axis=0)
        step = -(-(np.frexp(largest)[1] - _LOWEST) // _STEP)
        if step.max(initial=0) >= _SCALES:
            raise DataError(f"An input has a value of magnitude {largest.max():.3g}; above 1e38 nothing is summed.")
        seen[np.maximum(step, 0)[known], regime, np.flatnonzero(known)] = 1
    return seen.ravel()


def _first(columns: _Columns, scale: Floats, examples: Examples) -> Floats:
    """Counts and sums of each regime and column, [2 * regime * column]."""
    counts, sums = np.zeros_like(scale), np.zeros_like(scale)
    for regime, rows in columns.by_regime(examples):
        counts[regime] = (~np.isnan(rows)).sum(axis=0)
        sums[regime] = np.nansum(rows / scale[regime], axis=0)
    return np.concatenate([counts.ravel(), sums.ravel()])


def _second(columns: _Columns, unit: Floats, centre: Floats, examples: Examples) -> Floats:
    """Sums of squares about the centre of each regime and column, [regime * column]."""
    squares = np.zeros_like(unit)
    for regime, rows in columns.by_regime(examples):
        squares[regime] = np.nansum(np.square((rows - centre[regime]) / unit[regime]), axis=0)
    return squares.ravel()


def _counts(columns: _Columns, examples: Examples) -> Floats:
    """How many values each column has, [column]."""
    rows = columns.read(examples)
    counts: Floats = (~np.isnan(rows)).sum(axis=0).astype(np.float64)
    return counts


def _histogram(columns: _Columns, low: Floats, width: Floats, examples: Examples) -> Floats:
    """Counts of the values from ``low`` to ``low + width`` in bins, [column * bin]."""
    rows = columns.read(examples)
    with np.errstate(invalid="ignore"):
        bins = np.floor((rows - low) / width * _BINS)
        row, column = np.nonzero((bins >= 0) & (bins < _BINS))
    index = column * _BINS + bins[row, column].astype(np.int64)
    return np.bincount(index, minlength=rows.shape[1] * _BINS).astype(np.float64)


def _fit_scaling(columns: _Columns, examples: Examples) -> Function:
    rows = columns.read(examples)
    known = ~np.isnan(rows)
    count = np.maximum(known.sum(axis=0), 1)
    centre = np.where(known, rows, 0.0).sum(axis=0) / count
    spread = np.sqrt(np.where(known, np.square(rows - centre), 0.0).sum(axis=0) / count)
    std = np.where(spread > _ROUNDING * np.abs(np.nan_to_num(rows)).max(axis=0, initial=0.0), spread, 1.0)
    return Scaling(centre[None], std[None], columns.input, columns.axis).apply


def _fit_filling(columns: _Columns, examples: Examples) -> Function:
    rows = columns.read(examples)
    known = ~np.isnan(rows)
    means = np.where(known, rows, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return Filling(means, columns.input, columns.axis).apply


def _with_input(examples: Examples, input: int, values: NDArray[Any]) -> Examples:
    """The examples with another array for one input, in the old one's dtype (float32 for whole numbers)."""
    old = examples.inputs[input].dtype
    inputs = list(examples.inputs)
    inputs[input] = np.ascontiguousarray(values, dtype=old if old.kind == "f" else np.float32)
    return replace(examples, inputs=tuple(inputs))


def _adder(aggregator: Aggregator | None) -> Aggregator:
    return mean(weighted=False) if aggregator is None else aggregator

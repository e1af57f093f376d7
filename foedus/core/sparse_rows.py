"""Sparse examples: rows of which only the numbers that are not zero are held.

An example is a list of features that it has and their values. As the two inputs of
:class:`~foedus.core.examples.Examples` a set of them is

* ``indices`` int32 [example, place]: which feature, from 0;
* ``values`` float32 [example, place]: how much of it; 0 fills up rows that have fewer features than others.

Both share their first axis with the targets, so that taking, joining, partitioning, splitting and every executor treat
them like any other input. The width is that of the fullest row: cut or leave out the few longest rows if most are much
shorter. A feature that stands in a row twice counts as the sum.

:func:`sparse_rows` makes the two arrays of compressed rows (CSR); :class:`Compressed` are such rows, for algorithms
that walk over examples one by one. Nothing here makes an array [example, feature].

Not here: models of sparse examples (``core/sparse_linear.py``), words (``data/words.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foedus.errors import DataError

Array = NDArray[Any]


def sparse_rows(indices: ArrayLike, values: ArrayLike, *, offsets: ArrayLike) -> tuple[Array, Array]:
    """The inputs of sparse examples, of compressed rows: for ``Examples.of(sparse_rows(...), targets)``.

    Args:
        indices: the features of all rows, one row after another, [entry].
        values: their values, [entry].
        offsets: where each row begins, and the end of the last, [row + 1]. A SciPy CSR matrix ``m`` has all three:
            ``sparse_rows(m.indices, m.data, offsets=m.indptr)``.

    Returns:
        indices int32 [row, place] and values float32 [row, place] (float64 if they were), at least one place wide.

    Raises:
        DataError: the lengths do not fit, the offsets fall, an index is negative, above 2³¹ or no whole number, or a
            value is not finite.

    Example:
        >>> indices, values = sparse_rows([4, 0, 2], [1.0, 0.5, 3.0], offsets=[0, 1, 3])
        >>> indices.tolist(), values.tolist()
        ([[4, 0], [0, 2]], [[1.0, 0.0], [0.5, 3.0]])
    """
    found, starts = np.asarray(indices), np.asarray(offsets)
    weights = np.asarray(values)
    weights = weights if weights.dtype == np.float64 else weights.astype(np.float32)
    _check_entries(found, weights, starts)
    lengths = np.diff(starts)
    wide = np.zeros((len(lengths), max(1, int(lengths.max(initial=0)))), np.int32)
    filled = np.zeros(wide.shape, weights.dtype)
    there = np.arange(wide.shape[1]) < lengths[:, None]
    wide[there], filled[there] = found, weights
    return wide, filled


class Compressed(NamedTuple):
    """Sparse rows, one after another, without fillers, each feature at most once a row.

    Attributes:
        features: int64 [entry].
        values: [entry].
        offsets: int64 [row + 1], where each row begins and the last ends.
    """

    features: NDArray[np.int64]
    values: Array
    offsets: NDArray[np.int64]

    @staticmethod
    def of(inputs: tuple[Array, ...], features: int) -> Compressed:
        """The inputs of sparse examples as compressed rows.

        Raises:
            DataError: they are no sparse examples of so many features.

        Example:
            >>> Compressed.of((np.array([[4, 4], [1, 0]]), np.array([[1.0, 2.0], [5.0, 0.0]])), 5).values.tolist()
            [3.0, 5.0]
        """
        indices, values = check_sparse(inputs, features)
        there = values != 0
        rows = np.broadcast_to(np.arange(len(indices))[:, None], indices.shape)[there]
        places, inverse = np.unique(rows * np.int64(features) + indices[there], return_inverse=True)
        added = np.bincount(inverse, values[there], len(places)).astype(values.dtype)
        offsets = np.searchsorted(places, np.arange(len(indices) + 1) * np.int64(features))
        return Compressed(places % features, added, offsets)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Whose entry each one is, int64 [entry]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def times(self, vector: Array) -> Array:
        """Every row times a vector [feature]: [row]."""
        return np.bincount(self.rows, self.values * vector[self.features], len(self.offsets) - 1)

    def pulled(self, factors: Array, size: int) -> Array:
        """The sum of the rows times their factors [row]: [feature]."""
        return np.bincount(self.features, self.values * factors[self.rows], size)


def check_sparse(inputs: tuple[Array, ...], features: int) -> tuple[Array, Array]:
    """Check that inputs are sparse examples of so many features, and give (indices, values), both [..., row, place].

    Raises:
        DataError: says what is wrong, and in which row.

    Example:
        >>> check_sparse((np.array([[7]]), np.array([[1.0]])), 5)
        Traceback (most recent call last):
        foedus.errors.DataError: Row 0 has the feature 7, and the model was made for 5: from 0 to 4.
    """
    if len(inputs) != 2:
        raise DataError(
            f"Sparse examples have two inputs, indices and values (foedus.sparse_rows), and these have {len(inputs)}."
        )
    indices, values = inputs
    if indices.shape != values.shape or indices.ndim < 2:
        raise DataError(
            f"Sparse examples have as many indices as values, both [row, place], and these are {list(indices.shape)} "
            f"and {list(values.shape)}. foedus.sparse_rows fills rows up to one width."
        )
    if indices.dtype.kind not in "iu":
        raise DataError(
            f"Which features an example has are whole numbers, and the first input is {indices.dtype}. Sparse examples "
            "are (indices, values), in this order."
        )
    wrong = (indices < 0) | (indices >= features)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            f"Row {place[-2]} has the feature {indices[place]}, and the model was made for {features}: from 0 to "
            f"{features - 1}."
        )
    return indices, values


def _check_entries(indices: Array, values: Array, offsets: Array) -> None:
    if indices.ndim != 1 or indices.shape != values.shape:
        raise DataError(
            f"Compressed rows have as many indices as values, [entry] each, not {list(indices.shape)} and "
            f"{list(values.shape)}."
        )
    if indices.size and indices.dtype.kind not in "iu":
        raise DataError(f"Indices are whole numbers, not {indices.dtype}.")
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < 2**31:
        raise DataError(f"Indices lie from 0 to {2**31 - 1}, not from {indices.min()} to {indices.max()}.")
    if offsets.ndim != 1 or not len(offsets) or offsets.dtype.kind not in "iu":
        raise DataError("Offsets are whole numbers, where each row begins and the last ends: [row + 1].")
    if offsets[0] != 0 or offsets[-1] != len(indices) or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise DataError(
            f"Offsets rise from 0 to the number of entries, {len(indices)}; these begin with {offsets[:3].tolist()} "
            f"and end with {offsets[-1]}."
        )
    if not np.isfinite(values).all():
        raise DataError(f"The value of entry {int(np.argmin(np.isfinite(values)))} is not finite.")

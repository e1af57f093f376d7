"""Own data in a frame: pandas, polars or pyarrow, with a column that says whose each row is.

All of them are read through narwhals, so nothing here depends on which one it is. Columns of numbers are
used as they are, missing values become NaN; columns of categories are spread, one column of 0 and 1
for each category, which must be known (`federated_vocabulary` finds them without pooling).

Not here: files (`folders.py`), scaling and filling in (`preprocess.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import ClientId, Examples
from foedus.data.dataset import Dataset
from foedus.data.vocabulary import Vocabulary
from foedus.errors import ConfigurationError, DataError, MissingExtra

__all__ = ["from_frame", "values_by_client"]

Frame: TypeAlias = Any  # pandas.DataFrame, polars.DataFrame, pyarrow.Table
Categories: TypeAlias = Mapping[str, "Vocabulary | Sequence[str]"]


def from_frame(
    frame: Frame,
    *,
    target: str,
    client: str | None = None,
    inputs: Sequence[str] | None = None,
    categories: Categories | None = None,
    test: Frame | None = None,
    name: str = "own data",
) -> Dataset:
    """A data set of a frame's rows; ``from_frame(frame, target="y", client="ward").clients()``.

    The input is one matrix, float32 [row, column]; `Dataset.columns` names its columns.

    Args:
        frame: pandas, polars or pyarrow, in memory.
        target: the column to predict: numbers, or one of ``categories``, whose numbers it becomes.
        client: the column that says whose a row is, whole numbers or texts; None if there is none.
        inputs: the columns to use, in this order; default all but ``target`` and ``client``.
        categories: column -> its categories, or a `Vocabulary`. A value that is not among them, or
            missing, is 0 in all columns; as a target it is refused.
        test: another frame with the same columns, to evaluate on.
        name: for figures and records.

    Raises:
        DataError: naming the column: not there, text without categories, a client or target missing in some
            rows.
        MissingExtra: without narwhals.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"hospital": ["a", "b", "b"], "age": [61, 48, 70], "ill": [1, 0, 1]})
        >>> from_frame(frame, client="hospital", target="ill").clients()
        Clients(2 clients, 3 examples, resident)
    """
    table = _wrapped(frame)
    chosen = _chosen(table, target, client, inputs)
    words = {n: v if isinstance(v, Vocabulary) else Vocabulary(tuple(v)) for n, v in (categories or {}).items()}
    names = [label for column in chosen for label in _labels(column, words)]
    tests, test_groups = None, {}
    if test is not None:
        held = _wrapped(test)
        tests = _examples(held, chosen, target, words)
        test_groups = _groups(held, client) if client in held.columns else {}
    classes = words[target].words if target in words else ()
    return Dataset(
        name,
        _examples(table, chosen, target, words),
        tests,
        classes=classes,
        columns=tuple(names),
        groups=_groups(table, client),
        test_groups=test_groups,
    )


def values_by_client(frame: Frame, column: str, *, client: str) -> dict[ClientId, list[Any]]:
    """The values of a column for each client, as `federated_vocabulary` takes them.

    Raises:
        DataError: for a column that is not there.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"hospital": ["a", "b", "b"], "pain": ["none", "typical", "none"]})
        >>> values_by_client(frame, "pain", client="hospital")
        {'a': ['none'], 'b': ['typical', 'none']}
    """
    table = _wrapped(frame)
    _check_columns(table, [column, client])
    whose = _groups(table, client)[client]
    found: dict[ClientId, list[Any]] = {owner: [] for owner in np.unique(whose).tolist()}
    for owner, value in zip(whose.tolist(), _values(table[column]), strict=True):
        found[owner].append(value)
    return found


def _wrapped(frame: Frame) -> Any:
    try:
        import narwhals
    except ImportError as error:
        raise MissingExtra("narwhals", "data", "Reading a frame") from error
    try:
        return narwhals.from_native(frame, eager_only=True)
    except TypeError:
        raise DataError(
            f"A {type(frame).__name__} is not a frame in memory. Give a pandas or polars DataFrame or a "
            "pyarrow Table; of a polars LazyFrame, frame.collect()."
        ) from None


def _chosen(table: Any, target: str, client: str | None, inputs: Sequence[str] | None) -> list[str]:
    special = [target] if client is None else [target, client]
    if isinstance(inputs, str):
        raise ConfigurationError(f"inputs is a list of columns; write inputs=[{inputs!r}]")
    chosen = [c for c in table.columns if c not in special] if inputs is None else list(inputs)
    _check_columns(table, [*special, *chosen])
    if not chosen:
        raise DataError("There is no column left to be an input.")
    return chosen


def _check_columns(table: Any, names: Sequence[str]) -> None:
    if missing := [n for n in names if n not in table.columns]:
        raise DataError(f"There is no column {missing[0]!r}; there are: {', '.join(map(repr, table.columns))}.")


def _labels(column: str, words: Mapping[str, Vocabulary]) -> list[str]:
    return [f"{column}={word}" for word in words[column].words] if column in words else [column]


def _examples(table: Any, chosen: Sequence[str], target: str, words: Mapping[str, Vocabulary]) -> Examples:
    _check_columns(table, [target, *chosen])
    blocks = [
        words[c].spread(_values(table[c])) if c in words else _numbers(table[c]).astype(np.float32)[:, None]
        for c in chosen
    ]
    return Examples.of(np.concatenate(blocks, axis=1), _targets(table[target], words.get(target)))


def _targets(series: Any, words: Vocabulary | None) -> NDArray[Any]:
    import narwhals

    if missing := _values(series).count(None):
        raise DataError(f"The target {series.name!r} is missing in {missing} rows. Leave these rows out.")
    if words is None:
        whole = series.dtype.is_integer() or series.dtype == narwhals.Boolean
        values = _numbers(series)
        return values.astype(np.int64) if whole else values
    codes = words.codes(_values(series))
    if (codes == len(words.words)).any():
        other = series.to_list()[int(np.argmax(codes == len(words.words)))]
        raise DataError(f"The target {series.name!r} has the value {other!r}, which is not among {words.words}.")
    return codes


def _values(series: Any) -> list[Any]:
    """The column's values, None for what is missing: pandas writes NaN, NA or None, polars null or NaN."""
    missing = series.is_null().to_list()
    values = [None if gone else v for v, gone in zip(series.to_list(), missing, strict=True)]
    return [None if isinstance(v, float) and v != v else v for v in values]


def _numbers(series: Any) -> NDArray[np.float64]:
    """The column as float64, missing values as NaN."""
    import narwhals

    kind = series.dtype
    empty = series.is_null().all()  # a column without any value has no proper type
    if not (kind.is_numeric() or kind == narwhals.Boolean or empty):
        raise DataError(
            f"The column {series.name!r} holds {kind}, not numbers. Leave it out (inputs=[...]), or list its "
            f"categories: categories={{{series.name!r}: [...]}}, which federated_vocabulary can find."
        )
    if empty:
        return np.full(len(series), np.nan)
    values = _values(series.cast(narwhals.Float64))
    return np.array([np.nan if v is None else v for v in values], np.float64)


def _groups(table: Any, client: str | None) -> dict[str, NDArray[Any]]:
    if client is None:
        return {}
    _check_columns(table, [client])
    values = _values(table[client])
    if missing := values.count(None):
        raise DataError(f"The client column {client!r} is empty in {missing} rows. Leave these rows out.")
    if not all(isinstance(v, int | str) for v in values):
        wrong = next(v for v in values if not isinstance(v, int | str))
        raise DataError(f"Clients are named by whole numbers or texts, and {client!r} has {wrong!r}.")
    return {client: np.array(values)}

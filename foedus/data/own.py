"""Own data in memory: arrays, and map-style torch datasets.

Both give a `Dataset`, which a partition or a natural key turns into clients. Data that lies with its
clients already is written `Clients.of({id: (x, y)})`; data too large for the memory,
`Clients.generated(function, ids)`.

Not here: frames (`frames.py`) and files (`folders.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from foedus.core.population import Examples, Pair
from foedus.data.dataset import Dataset
from foedus.errors import DataError

__all__ = ["from_arrays", "from_torch"]


class MapStyle(Protocol):
    """What torch calls a map-style dataset: it has a length, and items ``(x, ..., y)`` by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: Pair | None = None,
    groups: Mapping[str, ArrayLike] | None = None,
    name: str = "own data",
) -> Dataset:
    """A data set of arrays.

    Args:
        x: inputs, [example, ...], as for `Examples.of`; several in a tuple or dict.
        y: targets, [example, ...].
        test: (x, y) or Examples to evaluate on.
        groups: natural keys, name -> a value per row; the first names the natural clients.
        name: for figures and records.

    Raises:
        DataError: for lengths that differ, or arrays that do not hold numbers.

    Example:
        >>> from_arrays([[0.1], [0.2], [0.3]], [0, 1, 1], groups={"ward": ["a", "b", "a"]}).clients().ids
        ('a', 'b')
    """
    tests = test if test is None or isinstance(test, Examples) else Examples.of(*test)
    keys = {key: np.asarray(values) for key, values in (groups or {}).items()}
    return Dataset(name, Examples.of(x, y), tests, groups=keys)


def from_torch(
    dataset: MapStyle,
    *,
    test: MapStyle | None = None,
    groups: Mapping[str, ArrayLike] | None = None,
    name: str = "own data",
) -> Dataset:
    """A data set of a map-style torch ``Dataset``, read once into memory.

    Items are ``(x, y)``, or ``(x1, x2, ..., y)`` for several inputs: tensors, arrays or numbers, all of
    one shape. Transforms are applied once; random ones give the same picture in every epoch.

    Args:
        dataset: e.g. a ``TensorDataset``, ``Subset`` or ``ImageFolder`` with ``ToTensor()``.
        test: another one, to evaluate on.
        groups, name: as for `from_arrays`.

    Raises:
        DataError: it is no such dataset, naming the first item that does not fit.

    Example:
        >>> import torch
        >>> from_torch(torch.utils.data.TensorDataset(torch.zeros(6, 2), torch.arange(6) % 2))
        Dataset(own data: train Examples(6: float32[2] -> int64), test none)
    """
    train = _collected(dataset, "dataset")
    tests = None if test is None else _collected(test, "test")
    keys = {key: np.asarray(values) for key, values in (groups or {}).items()}
    return Dataset(name, train, tests, groups=keys)


def _collected(dataset: MapStyle, argument: str) -> Examples:
    try:
        count = len(dataset)
    except TypeError:
        raise DataError(
            f"{argument} is a {type(dataset).__name__} without a length. A map-style dataset is needed, with "
            "len(dataset) and dataset[i]; read an iterable one into arrays and use from_arrays."
        ) from None
    if not count:
        raise DataError(f"{argument} is empty.")
    columns: list[Any] = []
    for i in range(count):
        item = dataset[i]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(f"{argument}[{i}] must be (x, y), or (x1, x2, ..., y), and is a {type(item).__name__}.")
        values = [np.asarray(value) for value in item]
        if not columns:
            columns = [np.empty((count, *value.shape), value.dtype) for value in values]
        _check_item(f"{argument}[{i}]", values, columns)
        for column, value in zip(columns, values, strict=True):
            column[i] = value
    return Examples.of(tuple(columns[:-1]), columns[-1])


def _check_item(name: str, values: list[Any], columns: list[Any]) -> None:
    shapes, wanted = [v.shape for v in values], [c.shape[1:] for c in columns]
    if shapes != wanted:
        raise DataError(f"{name} has shapes {shapes}, and the items before it {wanted}. Make them alike.")
    for value in values:
        if value.dtype.kind not in "fiub":
            raise DataError(f"{name} holds {value.dtype}, not numbers. Convert it, e.g. with transforms.ToTensor().")

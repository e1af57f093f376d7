"""A data set: training examples, test examples, and the natural groups that its rows fall into.

Loaders return a `Dataset`; `from_arrays` makes one of own arrays. A partition turns it into `Clients`.

Not here: the rules (`partition.py`), the loaders, and data that is divided among clients already (`own.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import Clients, Examples
from foedus.core.random import generator
from foedus.data.partition import Partition, by_key
from foedus.errors import ConfigurationError, DataError

__all__ = ["Dataset"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Examples in one place, before they are dealt out to clients.

    Attributes:
        name: for figures and records.
        train: the training examples.
        test: examples to evaluate on, or None.
        classes: the names of the classes, in the order of their numbers; empty for regression.
        columns: the names of the input's columns, for tables; else empty.
        groups: natural keys: name -> a value per training row, [row]; the first one is the natural one.
        test_groups: the same for the test rows, where they are known.
        about: source, to be cited.

    Example:
        >>> from foedus.data.partition import iid
        >>> examples = Examples.of([[0.1], [0.2], [0.3], [0.4]], [0, 1, 1, 0])
        >>> Dataset("mine", examples, classes=("well", "ill")).partition(iid(2))
        Clients(2 clients, 4 examples, resident)
    """

    name: str
    train: Examples
    test: Examples | None = None
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    groups: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    test_groups: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    about: str = ""

    def __post_init__(self) -> None:
        for groups, examples in ((self.groups, self.train), (self.test_groups, self.test)):
            for name, values in groups.items():
                rows = 0 if examples is None else len(examples)
                if values.shape != (rows,):
                    raise DataError(f"The group {name!r} needs one value per row: {rows}, not {list(values.shape)}.")

    def partition(self, rule: Partition, *, seed: int = 0) -> Clients:
        """Deal the training rows out to clients; the test examples become the central test.

        Under `by_key` with the name of a group the test rows go to their clients as well, where the test
        rows have that group; rows of keys that no training row has stay in the central test only.

        Args:
            rule: e.g. ``iid(100)``, ``by_class(10, share=0.9)``.
            seed: another seed, another deal.
        """
        if not isinstance(rule, Partition):
            raise ConfigurationError(
                "partition() takes a rule such as foedus.data.iid(10) or foedus.data.by_class(10, share=0.9); not "
                f"{getattr(rule, '__name__', None) or repr(rule)}"
            )
        dealt = rule.deal(self.train.targets, self.groups, generator(seed, "partition"))
        tests, nothing = None, np.empty(0, np.int64)
        if self.test is not None and rule.key in self.test_groups:
            found = rule.deal(self.test.targets, self.test_groups, generator(seed, "partition", "test"))
            tests = (self.test, [found.get(client, nothing) for client in dealt])
        return Clients.pooled(self.train, dealt.values(), dealt, test=tests, central_test=self.test)

    def clients(self, key: str | None = None, *, seed: int = 0) -> Clients:
        """One client per value of a natural key: of the first group, or of the one named.

        Raises:
            DataError: the data set has no natural key.
        """
        if not self.groups:
            raise DataError(
                f"The data set {self.name!r} has no natural clients. "
                "Write .partition(iid(nodes=10)), or another partition."
            )
        return self.partition(by_key(key or next(iter(self.groups))), seed=seed)

    def __repr__(self) -> str:
        test = "none" if self.test is None else len(self.test)
        groups = f", groups: {', '.join(self.groups)}" if self.groups else ""
        return f"Dataset({self.name}: train {self.train!r}, test {test}{groups})"

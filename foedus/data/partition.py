"""Partitions: rules by which the rows of one data set are dealt out to clients.

A `Partition` is a value, a function of the targets and a random generator. Apply it with
`Dataset.partition(rule, seed=0)`. The same seed deals the same way on every machine.

    iid              rows at random, equal sizes
    shards           rows sorted by target, each client a few contiguous shards (McMahan et al. 2017)
    dirichlet        each class spread by a Dirichlet draw (Hsu et al. 2019, Yurochkin et al. 2019)
    by_class         a given share of one class on each node, the rest evenly from the others
    by_key           one client per value of a natural key (hospital, engine, writer)
    quantity_skew    rows at random, sizes by a Dirichlet draw (Li et al. 2022)

Every rule uses every row exactly once, but for `by_class`, which says what it leaves out; and every node gets a
row, where the rule does not say otherwise (``minimum=0``): more nodes than rows are refused.

Not here: splitting each client's own rows into training and test (`Clients.split`), and the picture of
a partition (`foedus.report.plot_partition`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.population import ClientId
from foedus.errors import ConfigurationError, DataError

__all__ = ["Partition", "by_class", "by_key", "dirichlet", "iid", "quantity_skew", "shards"]

Array: TypeAlias = NDArray[Any]
Rows: TypeAlias = NDArray[np.int64]
Groups: TypeAlias = Mapping[str, Array]  # name -> a value per row, [row]


class Partition(NamedTuple):
    """A rule that deals rows to clients.

    * ``deal(targets, groups, generator) -> {client id: row numbers}``
    * ``label``: how it was written, for figures and records.
    * ``key``: the name of the natural key that it follows, if it does; then test rows are dealt alike.

    Own rules are made the same way. Odd and even rows to two clients:

    Example:
        >>> odd_even = Partition(
        ...     lambda targets, groups, generator: {i: np.arange(i, len(targets), 2) for i in range(2)},
        ...     label="odd_even()",
        ... )
        >>> odd_even.deal(np.zeros(5), {}, np.random.default_rng(0))[1]
        array([1, 3])
    """

    deal: Callable[[Array, Groups, np.random.Generator], Mapping[ClientId, Rows]]
    label: str
    key: str | None = None


def iid(nodes: int) -> Partition:
    """Rows at random, each on one of ``nodes`` nodes; sizes differ by one at most.

    Example:
        >>> {i: len(r) for i, r in iid(3).deal(np.zeros(10), {}, np.random.default_rng(0)).items()}
        {0: 4, 1: 3, 2: 3}
    """
    _check_nodes(nodes)

    def deal(targets: Array, _groups: Groups, generator: np.random.Generator) -> Mapping[ClientId, Rows]:
        _check_enough(len(targets), nodes, 1)
        return _numbered(np.array_split(generator.permutation(len(targets)), nodes))

    return Partition(deal, f"iid({nodes})")


def shards(nodes: int, *, shards_per_node: int = 2) -> Partition:
    """Rows sorted by target and cut into ``nodes * shards_per_node`` shards, dealt at random.

    With classes most nodes see few of them: on MNIST 100 nodes with two shards of 300 rows each have
    two digits, mostly. Rows of one class keep their order; shards differ by one row at most.

    Source: McMahan et al. 2017, section 3.

    Example:
        >>> rule, y = shards(2, shards_per_node=1), np.array([1, 0, 1, 0])
        >>> sorted(y[rows].tolist() for rows in rule.deal(y, {}, np.random.default_rng(0)).values())
        [[0, 0], [1, 1]]
    """
    _check_nodes(nodes)
    check_whole("shards_per_node", shards_per_node, least=1)

    def deal(targets: Array, _groups: Groups, generator: np.random.Generator) -> Mapping[ClientId, Rows]:
        _check_enough(len(targets), nodes, shards_per_node)
        ordered = np.argsort(_flat(targets), kind="stable")
        pieces = np.array_split(ordered, nodes * shards_per_node)
        dealt = generator.permutation(len(pieces)).reshape(nodes, shards_per_node)
        return _numbered([np.concatenate([pieces[s] for s in own]) for own in dealt])

    return Partition(deal, f"shards({nodes}, shards_per_node={shards_per_node})")


def dirichlet(nodes: int, *, alpha: float, minimum: int = 1) -> Partition:
    """Each class spread over the nodes in shares drawn from a symmetric Dirichlet distribution.

    Small ``alpha`` gives nodes of few classes and of very different sizes; a large one comes close to
    `iid`. A node left with fewer than ``minimum`` rows is filled up with rows taken at random from the
    node that has most, one at a time.

    Args:
        nodes: number of clients.
        alpha: concentration, above 0; 0.1 to 1 is usual.
        minimum: rows that every node gets at least.

    Source: Yurochkin et al., ICML 2019 (per class over clients); Hsu et al. 2019, arXiv:1909.06335.

    Example:
        >>> rule, y = dirichlet(3, alpha=0.5), np.repeat([0, 1], 10)
        >>> sum(len(rows) for rows in rule.deal(y, {}, np.random.default_rng(0)).values())
        20
    """
    _check_nodes(nodes)
    check_number("alpha", alpha, above=True)
    check_whole("minimum", minimum, least=0)

    def deal(targets: Array, _groups: Groups, generator: np.random.Generator) -> Mapping[ClientId, Rows]:
        _check_enough(len(targets), nodes, minimum)
        owner = np.empty(len(targets), np.int64)
        for rows in _by_value(_flat(targets)).values():
            sizes = _apportion(len(rows), generator.dirichlet(np.full(nodes, alpha)))
            owner[generator.permutation(rows)] = np.repeat(np.arange(nodes), sizes)
        _fill_up(owner, nodes, minimum, generator)
        return _numbered([np.flatnonzero(owner == node) for node in range(nodes)])

    return Partition(deal, f"dirichlet({nodes}, alpha={alpha:g}, minimum={minimum})")


def by_class(nodes: int, *, share: float) -> Partition:
    """A share of one class on each node, the rest evenly from all the other classes; equal sizes.

    Node k has home class ``k mod C`` of the C classes (in sorted order). Every node gets m rows:
    ``share * m`` (rounded) of its home class, and the rest from the other classes, as many of each, give
    or take one. m is the largest number for which no row is needed twice. With as many nodes as
    classes m is the size of the rarest class whatever the share, so that shares compare on equal
    terms; with classes of unequal size some rows of the frequent ones remain unused (MNIST on 10 nodes:
    m = 5,421, and 54,210 of 60,000 rows are used).

    Args:
        nodes: number of clients.
        share: of a node's rows that are of its home class, from 1/C (uniform) to 1 (nothing else).

    Raises:
        ConfigurationError: for a share that cannot be; one below 1/C is noticed when rows are dealt.

    Example:
        >>> rule = by_class(2, share=0.75)
        >>> y = np.repeat([0, 1], 8)
        >>> [np.bincount(y[r]).tolist() for r in rule.deal(y, {}, np.random.default_rng(0)).values()]
        [[6, 2], [2, 6]]
    """
    _check_nodes(nodes)
    check_number("share", share, above=True)
    if share > 1:
        raise ConfigurationError(f"share must lie above 0 and be at most 1, and is {share}.")

    def deal(targets: Array, _groups: Groups, generator: np.random.Generator) -> Mapping[ClientId, Rows]:
        classes = [generator.permutation(rows) for rows in _by_value(_flat(targets)).values()]
        if share * len(classes) < 1 - 1e-9:  # a third, written as 0.333333333, is one
            raise ConfigurationError(
                f"by_class({nodes}, share={share:g}): with {len(classes)} classes the share of the home class goes "
                f"from {1 / len(classes):.4g} (as much as of any other) to 1. For less, write a Partition of your own."
            )
        counts = _class_counts(nodes, np.array([len(rows) for rows in classes]), share)
        ends = np.cumsum(counts, axis=0)
        pieces = [
            [rows[ends[k, c] - counts[k, c] : ends[k, c]] for c, rows in enumerate(classes)] for k in range(nodes)
        ]
        return _numbered([generator.permutation(np.concatenate(own)) for own in pieces])

    return Partition(deal, f"by_class({nodes}, share={share:g})")


def by_key(key: str | ArrayLike) -> Partition:
    """One client per value of a key, named by that value, in sorted order.

    Args:
        key: the name of one of the data set's groups (``heart_disease().groups`` has ``"hospital"``), or
            one value per row, [row].

    Raises:
        DataError: there is no such group, or the number of values is not that of the rows.

    Example:
        >>> by_key(["b", "a", "b"]).deal(np.zeros(3), {}, np.random.default_rng(0))
        {'a': array([1]), 'b': array([0, 2])}
    """

    def deal(targets: Array, groups: Groups, _generator: np.random.Generator) -> Mapping[ClientId, Rows]:
        values = _group(groups, key) if isinstance(key, str) else np.asarray(key)
        if values.shape != (len(targets),):
            raise DataError(f"by_key needs one value per row: {len(targets)}, not {list(values.shape)}.")
        return _by_value(values)

    if isinstance(key, str):
        return Partition(deal, f"by_key({key!r})", key)
    return Partition(deal, "by_key(...)")


def quantity_skew(nodes: int, *, alpha: float = 1.0, minimum: int = 1) -> Partition:
    """Rows at random, but sizes in shares drawn from a symmetric Dirichlet distribution.

    Every node first gets ``minimum`` rows; the rest is shared out. Small ``alpha``: few nodes have most.

    Source: Li et al. 2022, "Federated learning on non-IID data silos", section IV (quantity skew).

    Example:
        >>> rule, y = quantity_skew(3, alpha=0.5), np.zeros(20)
        >>> sum(len(rows) for rows in rule.deal(y, {}, np.random.default_rng(0)).values())
        20
    """
    _check_nodes(nodes)
    check_number("alpha", alpha, above=True)
    check_whole("minimum", minimum, least=0)

    def deal(targets: Array, _groups: Groups, generator: np.random.Generator) -> Mapping[ClientId, Rows]:
        spare = _check_enough(len(targets), nodes, minimum)
        sizes = minimum + _apportion(spare, generator.dirichlet(np.full(nodes, alpha)))
        rows = generator.permutation(len(targets))
        return _numbered(np.split(rows, np.cumsum(sizes)[:-1]))

    return Partition(deal, f"quantity_skew({nodes}, alpha={alpha:g}, minimum={minimum})")


def _numbered(rows: Sequence[Array]) -> dict[ClientId, Rows]:
    return {node: own.astype(np.int64, copy=False) for node, own in enumerate(rows)}


def _by_value(values: Array) -> dict[ClientId, Rows]:
    """The rows of each value, in sorted order of the values."""
    found, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    pieces = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    return dict(zip(found.tolist(), pieces, strict=True))


def _apportion(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """``total`` in whole numbers close to these shares: cut points rounded, so that the sum is exact."""
    cuts = np.rint(np.cumsum(shares) / shares.sum() * total).astype(np.int64)
    cuts[-1] = total
    sizes: NDArray[np.int64] = np.diff(cuts, prepend=0)
    return sizes


def _fill_up(owner: NDArray[np.int64], nodes: int, minimum: int, generator: np.random.Generator) -> None:
    """Move rows, in place, until every node has at least ``minimum``."""
    sizes = np.bincount(owner, minlength=nodes)
    for node in np.flatnonzero(sizes < minimum):
        while sizes[node] < minimum:
            donor = int(sizes.argmax())
            row = generator.choice(np.flatnonzero(owner == donor))
            owner[row] = node
            sizes[donor] -= 1
            sizes[node] += 1


def _class_counts(nodes: int, available: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """Rows of each class on each node for the largest equal size that can be had, int64 [node, class]."""
    classes = len(available)
    if classes < 2:
        raise DataError("by_class needs targets of at least two classes, and there is only one.")
    homes = np.bincount(np.arange(nodes) % classes, minlength=classes)
    demand = homes * share + (nodes - homes) * (1 - share) / (classes - 1)  # per row of node size
    bound = np.floor((available + nodes) / np.maximum(demand, 1e-9)).min()  # roundings add under `nodes`
    largest = int(min(bound, available.sum() // nodes))
    for size in range(largest, 0, -1):
        counts = _wanted(nodes, classes, size, share)
        if (counts.sum(axis=0) <= available).all():
            return counts
    raise DataError(
        f"by_class({nodes}, share={share:g}) cannot be dealt: with {int(available.sum())} rows in {classes} "
        f"classes, the rarest of {int(available.min())}, not one row per node comes out. Use fewer nodes."
    )


def _wanted(nodes: int, classes: int, size: int, share: float) -> NDArray[np.int64]:
    """The rule of `by_class` for nodes of ``size`` rows, int64 [node, class]."""
    node = np.arange(nodes)[:, None]
    home = int(np.floor(share * size + 0.5))
    each, over = divmod(size - home, classes - 1)
    away = (np.arange(classes) - node) % classes  # 0 at home, else 1 .. classes-1
    # The next classes after home give the rows left over, so that over all homes each gives as many.
    return np.where(away == 0, home, each + (away <= over))


def _flat(targets: Array) -> Array:
    if targets.ndim != 1:
        raise DataError(
            f"This partition goes by the target, which must be one number per row, and here it has shape "
            f"{list(targets.shape)}. Use iid, quantity_skew or by_key."
        )
    return targets


def _group(groups: Groups, name: str) -> Array:
    if name not in groups:
        known = ", ".join(repr(n) for n in groups) or "none"
        raise DataError(f"There is no group {name!r} in this data set; it has: {known}.")
    return groups[name]


def _check_nodes(nodes: int) -> None:
    check_whole("The number of nodes", nodes)


def _check_enough(rows: int, nodes: int, minimum: int) -> int:
    spare = rows - nodes * minimum
    if spare < 0:
        raise DataError(
            f"{nodes} nodes with at least {minimum} row{'s' * (minimum > 1)} each need more than the {rows} there are. "
            f"Use at most {rows // minimum} nodes."
        )
    return spare

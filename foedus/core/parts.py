"""Parts: the training, validation or test data of every client of a population, and what is done to them.

A `Part` answers two questions: what are the examples of the client at this position, and how many are
there. If all of them lie in one pool, it also says which rows each client has, so that an engine may
gather a whole cohort at once. Operations make new parts: where there is a pool they work on row
numbers only, otherwise they are carried out when a client is read. Readers are functions of this
module bound to their data, so that a population can be sent to another process.

Not here: names of clients and the checks of what a user writes (`core/population.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foedus.core.examples import Array, Examples
from foedus.core.random import fold, key, order
from foedus.errors import DataError

__all__ = ["ClientId", "Fit", "Function", "Part", "Rows"]

ClientId: TypeAlias = int | str
Function: TypeAlias = Callable[[Examples], Examples]
Shares: TypeAlias = tuple[float, float]  # of validation and of test
Fit: TypeAlias = Callable[[Examples], Function]  # training examples -> what is then applied to every part


@final
@dataclass(frozen=True, eq=False)
class Rows(Sequence[Array]):
    """A sequence of arrays of row numbers, one per client, held as two arrays however many there are.

    Attributes:
        values: int64 [sum of sizes]: all row numbers, client after client.
        offsets: int64 [client + 1]: client i has ``values[offsets[i] : offsets[i + 1]]``.
    """

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[ArrayLike]) -> Rows:
        """Rows of one array of row numbers per client.

        Example:
            >>> [r.tolist() for r in Rows.of([[3, 1], [], [0]])]
            [[3, 1], [], [0]]
        """
        if isinstance(rows, Rows):
            return rows
        arrays = [np.asarray(r) for r in rows]
        for i, array in enumerate(arrays):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise DataError(
                    f"The rows of a client are a list of row numbers, and those at position {i} are "
                    f"{array.dtype}{list(array.shape)}. For a mask, write np.flatnonzero(mask)."
                )
        values = np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64, casting="unsafe")
        return cls(values, offsets_of([len(a) for a in arrays]))

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Row numbers per client, int64 [client]."""
        return np.diff(self.offsets)

    def choose(self, positions: NDArray[np.int64]) -> Rows:
        """The rows of these clients, in this order."""
        sizes = self.sizes[positions]
        offsets = offsets_of(sizes)
        shift = np.repeat(self.offsets[positions] - offsets[:-1], sizes)
        return Rows(self.values[np.arange(len(shift)) + shift], offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return self.choose(np.arange(len(self))[position])
        return self.values[self.offsets[position] : self.offsets[position + 1]]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One part (training, validation or test) of every client's data.

    Attributes:
        read: position -> the `Examples` of that client.
        sizes: examples per client, int64 [client]; None where nobody knows before reading.
        pool: for a resident population the pool and the rows of each client; None otherwise.
    """

    read: Callable[[int], Examples]
    sizes: NDArray[np.int64] | None = None
    pool: tuple[Examples, Rows] | None = None


def resident(pool: Examples, rows: Rows) -> Part:
    """Clients that are sets of rows of one pool."""
    return Part(partial(_take, pool, rows), rows.sizes, (pool, rows))


def laid_out(parts: Sequence[Examples], sizes: ArrayLike) -> Part:
    """A resident part whose pool is ``parts`` one after another, cut into pieces of ``sizes`` [client]."""
    offsets = offsets_of(sizes)
    return resident(Examples.concat(parts), Rows(np.arange(offsets[-1]), offsets))


def mapped(part: Part, function: Function) -> Part:
    """``function`` applied to the examples of each client, at once where they are resident."""
    return _settled(part, Part(partial(_apply, part, function)))


def mapped_some(part: Part, function: Function, positions: NDArray[np.int64]) -> Part:
    """``function`` applied to the examples of the clients at ``positions``, which must be as many afterwards."""
    if part.pool is None:
        return Part(partial(_apply_some, part, function, frozenset(positions.tolist())), part.sizes)
    pool, rows = part.pool
    changed = [_apply_some(part, function, frozenset([p]), p) for p in positions.tolist() if part.read(p)]
    if not changed:
        return part
    values, moved = rows.values.copy(), np.concatenate([_places(rows, p) for p in positions.tolist()])
    values[moved] = len(pool) + np.arange(len(moved))
    return resident(Examples.concat([pool, *changed]), Rows(values, rows.offsets))


def fitted(training: Part, part: Part, fit: Fit) -> Part:
    """What ``fit`` makes of a client's training examples, applied to that client's ``part``."""
    return _settled(part, Part(partial(_apply_fitted, training, part, fit)))


def chosen(part: Part, positions: NDArray[np.int64]) -> Part:
    """The clients at ``positions``."""
    if part.pool is not None:
        return resident(part.pool[0], part.pool[1].choose(positions))
    sizes = None if part.sizes is None else part.sizes[positions]
    return Part(partial(_read_chosen, part, positions), sizes)


def cut(part: Part, ids: Sequence[ClientId], *, shares: Shares, seed: int, which: int) -> Part:
    """Piece ``which`` of every client's examples: 0 training, 1 validation, 2 test."""
    if part.pool is None:
        read = partial(_read_cut, part, ids, (shares, seed), which)
        return Part(read, None if part.sizes is None else _counts(part.sizes, shares)[:, which])
    pool, rows = part.pool
    counts = _counts(rows.sizes, shares)
    dealt = order(_split_keys(ids, seed), rows.sizes) + np.repeat(rows.offsets[:-1], rows.sizes)
    pieces = np.repeat(np.tile(np.arange(3), len(rows)), counts.ravel())
    return resident(pool, Rows(rows.values[dealt][pieces == which], offsets_of(counts[:, which])))


def applied(function: Callable[[Examples], Any], examples: Examples) -> Examples:
    """What ``function`` returns for ``examples``; refuses anything but Examples."""
    result = function(examples)
    if not isinstance(result, Examples):
        name = getattr(function, "__name__", repr(function))
        raise DataError(f"{name} must return Examples, and returned a {type(result).__name__}.")
    return result


def offsets_of(sizes: ArrayLike) -> NDArray[np.int64]:
    """Where each segment starts, and the end of the last: int64 [segment + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _take(pool: Examples, rows: Rows, position: int) -> Examples:
    return pool.take(rows[position])


def _apply(part: Part, function: Function, position: int) -> Examples:
    return applied(function, part.read(position))


def _apply_some(part: Part, function: Function, chosen: frozenset[int], position: int) -> Examples:
    examples = part.read(position)
    if position not in chosen or not len(examples):
        return examples
    result = applied(function, examples)
    if len(result) != len(examples):
        name = getattr(function, "__name__", repr(function))
        raise DataError(f"{name} must keep the number of examples, and made {len(result)} of {len(examples)}.")
    return result


def _places(rows: Rows, position: int) -> NDArray[np.int64]:
    """Where the rows of a client lie in ``rows.values``."""
    return np.arange(rows.offsets[position], rows.offsets[position + 1])


def _apply_fitted(training: Part, part: Part, fit: Fit, position: int) -> Examples:
    return applied(fit(training.read(position)), part.read(position))


def _read_chosen(part: Part, positions: NDArray[np.int64], position: int) -> Examples:
    return part.read(int(positions[position]))


def _read_cut(part: Part, ids: Sequence[ClientId], how: tuple[Shares, int], which: int, position: int) -> Examples:
    shares, seed = how
    examples = part.read(position)
    size = np.array([len(examples)])
    starts = offsets_of(_counts(size, shares)[0])
    return examples.take(order(_split_keys([ids[position]], seed), size)[starts[which] : starts[which + 1]])


def _settled(old: Part, new: Part) -> Part:
    """The new part, laid out in a pool of its own if the old one is resident; empty clients stay so."""
    if old.pool is None or old.sizes is None:
        return new
    full = np.flatnonzero(old.sizes)
    if not len(full):
        return old
    results = [new.read(int(position)) for position in full]
    lengths = np.zeros(len(old.sizes), np.int64)
    lengths[full] = [len(r) for r in results]
    return laid_out(results, lengths)


def _split_keys(ids: Sequence[ClientId], seed: int) -> NDArray[np.uint64]:
    """One key per client, [client]; the same whether asked for one client or for all."""
    if isinstance(ids, range):
        return fold(key(seed, "split"), np.asarray(ids).astype(np.uint64))
    return np.array([key(seed, "split", i) for i in ids], dtype=np.uint64)


def _counts(sizes: NDArray[np.int64], shares: Shares) -> NDArray[np.int64]:
    """How many examples go to training, validation and test, int64 [client, 3]; the rule of Clients.split."""
    validation, test = (np.floor(sizes * share + 0.5).astype(np.int64) for share in shares)
    spare = np.maximum(sizes - 1, 0)  # training keeps at least one
    test = np.minimum(test, spare)
    validation = np.minimum(validation, spare - test)
    return np.stack([sizes - validation - test, validation, test], axis=1)

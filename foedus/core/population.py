"""Examples and clients: the data of a federation, as values.

`Examples` is a set of training examples, arrays that share their first axis. `Clients` is a
population: ids, and for every client its training examples and, where there are any, validation and
test examples, got by *position* 0 .. n-1. There are two kinds, told apart by nothing but what is known:

* *resident*: all examples lie in one pool and a client is a set of rows of it (`Clients.pooled`,
  `Clients.of`). Nothing is copied until a client is read, and an engine may gather a whole cohort
  from `Clients.pool` at once.
* *generated*: a function makes the examples of a client when asked (`Clients.generated`). Nothing as
  large as the population is ever made, so that it may have a million clients.

Not here: where data comes from (`foedus.data`), how rows are dealt out to clients
(`foedus.data.partition`), and how a client's examples become batches (`core/batches.py`).
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foedus.core.checks import check_whole, named
from foedus.core.examples import Array, Examples, check_targets
from foedus.core.parts import (
    ClientId,
    Fit,
    Function,
    Part,
    Rows,
    applied,
    chosen,
    cut,
    fitted,
    laid_out,
    mapped,
    mapped_some,
    resident,
)
from foedus.core.stream import ByRound, arrived
from foedus.errors import ConfigurationError, DataError, FoedusError

__all__ = ["ClientId", "Clients", "Examples", "Pair", "Part", "Rows", "check_targets"]

Pair: TypeAlias = "Examples | tuple[Any, Any]"  # what a client's data may be written as: Examples or (x, y)
Dealt: TypeAlias = tuple[Examples, Iterable[ArrayLike]]  # a pool, and each client's rows in it


@final
@dataclass(frozen=True, eq=False, repr=False)
class Clients:
    """A population of clients. Made by `Clients.pooled`, `Clients.of` or `Clients.generated`.

    Clients are addressed by *position* 0 .. n-1; ``ids[position]`` is the name that the user gave.
    Changes (`map`, `split`, `subset`, `with_test`) make new values; nothing is changed in place.

    An empty client and a client of one example are allowed. The rule for an empty one: it may be in a
    cohort, takes no local step and carries no weight. `split` says what becomes of small clients.

    Attributes:
        ids: the clients' names, all different, whole numbers or texts.
        training: the training part of each client.
        validating, testing: the other parts, or None.
        central_test: examples that the server evaluates on, or None.

    Example:
        >>> clients = Clients.of({"north": ([[0.0], [1.0]], [0, 1]), "south": ([[3.0]], [1])})
        >>> clients
        Clients(2 clients, 3 examples, resident)
        >>> clients.train(1)
        Examples(1: float32[1] -> int64)
    """

    ids: Sequence[ClientId]
    training: Part
    validating: Part | None = None
    testing: Part | None = None
    central_test: Examples | None = None
    later: ByRound | None = None

    @classmethod
    def streamed(cls, function: Callable[[int], Clients]) -> Clients:
        """Clients whose data changes from round to round: a function from the round (from 1) to the population.

        It must answer the same every time, with the same clients. Populations that are resident keep one pool: let the
        function choose rows of it (:meth:`arriving` does), or make them by ``Clients.generated``.

        Example:
            >>> drifting = Clients.streamed(lambda r: Clients.generated(lambda i: ([[float(r)]], [i]), 2))
            >>> drifting.at(3).train(1).inputs[0]
            array([[3.]], dtype=float32)
        """
        if not callable(function):
            raise ConfigurationError(
                "Clients.streamed() takes a function from the round to the population, e.g. "
                f"Clients.streamed(lambda round: Clients.generated(...)); not {reprlib.repr(function)}"
            )
        name = getattr(function, "__name__", type(function).__name__)
        return cls._streaming(ByRound(function, f"streamed({name})", named(function)))

    @classmethod
    def _streaming(cls, later: ByRound) -> Clients:
        return replace(cls._then(later, 1), later=later)

    @classmethod
    def _then(cls, later: ByRound, round: int) -> Clients:
        """What the function of a stream gives for a round; its errors say whose they are."""
        try:
            found: Any = later(round)
        except FoedusError:
            raise
        except Exception as error:
            raise DataError(f"{later.label} failed in round {round}: {type(error).__name__}: {error}") from error
        if not isinstance(found, Clients):
            raise DataError(
                f"{later.label} gives {reprlib.repr(found)} in round {round}, and a population is wanted: "
                "Clients.generated(...), or a choice of rows of one pool"
            )
        return found

    def at(self, round: int) -> Clients:
        """The population as it is in a round, counted from 1; itself, unless its data changes.

        Raises:
            DataError: the function of ``Clients.streamed`` gives other clients, or another pool, than at first.
        """
        if self.later is None:
            return self
        found = self._then(self.later, max(1, round))
        other = found.ids is not self.ids and tuple(found.ids) != tuple(self.ids)
        theirs, ours = found.pool and found.pool[0], self.pool and self.pool[0]
        if not other and theirs is not ours and theirs and ours and theirs.digest() == ours.digest():
            # The function made the pool again, as it does in another process: one copy will do.
            assert found.pool is not None
            found = self.later.instead(round, replace(found, training=resident(ours, found.pool[1])))
            theirs = ours
        if other or theirs is not ours:
            what = "other clients" if other else "another pool of examples"
            raise DataError(
                f"{self.later.label} gives {what} in round {round} than in round 1. Ids stay the same, and resident "
                "populations choose rows of one pool; or make each round's data by Clients.generated"
            )
        return found

    def arriving(self, per_round: int, *, window: int | None = None) -> Clients:
        """The same clients, whose training examples arrive over rounds in the order they have now.

        In round r a client holds its first ``r · per_round`` training examples; with a window, the last ``window`` of
        those. Validation and test data, and the central test, are there from the start. Change the data first
        (``map``, ``split``): a stream is not changed any more.

        Args:
            per_round: examples that arrive at each client in every round.
            window: how many a client keeps; ``None`` for all.

        Raises:
            ConfigurationError: the population is generated: give a function to ``Clients.streamed``.

        Example:
            >>> clients = Clients.of({"a": ([[0.0], [1.0], [2.0]], [0, 1, 2])}).arriving(1, window=2)
            >>> [clients.at(r).train(0).targets.tolist() for r in (1, 2, 3, 4)]
            [[0], [0, 1], [1, 2], [1, 2]]
        """
        check_whole("per_round", per_round)
        if window is not None:
            check_whole("window", window, also=", or None to keep all")
        self._check_still("arriving")
        if self.pool is None:
            raise ConfigurationError(
                "arriving() needs a resident population, whose examples are known; for a generated one write "
                "Clients.streamed(lambda round: Clients.generated(...))"
            )
        then = partial(_arrived, self, per_round=per_round, window=window)
        return self._streaming(ByRound(then, f"arriving({per_round}, window={window})"))

    def _check_still(self, name: str) -> None:
        if self.later is not None:
            raise ConfigurationError(
                f"{name}() changes a population whose data arrives over rounds. Change it before it streams: "
                f"clients.{name}(...).arriving(...), or within the function of Clients.streamed"
            )

    @classmethod
    def pooled(
        cls,
        pool: Examples,
        rows: Iterable[ArrayLike],
        ids: Iterable[ClientId] | None = None,
        *,
        validation: Dealt | None = None,
        test: Dealt | None = None,
        central_test: Pair | None = None,
    ) -> Clients:
        """Clients that are sets of rows of one pool, which is held once.

        Args:
            pool: all examples.
            rows: for each client its row numbers in the pool.
            ids: a name for each client; default 0, 1, 2, ...
            validation, test: those parts, each as (pool, rows), in the order of the ids.
            central_test: examples for the server to evaluate on.

        Raises:
            DataError: for a row number outside the pool, duplicate ids, or no client at all.
        """
        held = Rows.of(rows)
        names = _check_ids(range(len(held)) if ids is None else ids)
        validating, testing = (None if dealt is None else _dealt(names, *dealt) for dealt in (validation, test))
        return cls(names, _dealt(names, pool, held), validating, testing, _central(central_test))

    @classmethod
    def of(
        cls,
        train: Mapping[ClientId, Pair],
        *,
        validation: Mapping[ClientId, Pair] | None = None,
        test: Mapping[ClientId, Pair] | None = None,
        central_test: Pair | None = None,
    ) -> Clients:
        """Clients of ``{id: (x, y)}``, each pair as for `Examples.of`; they are put into one pool.

        Args:
            train: the training examples of each client.
            validation, test: those parts; a client that is not mentioned has none.
            central_test: examples for the server to evaluate on.

        Raises:
            DataError: clients differ in shape, or a part names a client that ``train`` does not.
        """
        if not isinstance(train, Mapping):
            raise DataError(
                f"Clients.of takes a dict of client ids and data, {{'hospital a': (x, y), ...}}, and was given a "
                f"{type(train).__name__}. For a list: Clients.of(dict(enumerate(pairs)))."
            )
        ids = _check_ids(train)
        parts = [None if p is None else _gathered(ids, p) for p in (train, validation, test)]
        training = parts[0]
        assert training is not None
        return cls(ids, training, parts[1], parts[2], _central(central_test))

    @classmethod
    def generated(
        cls,
        function: Callable[[Any], Pair],
        ids: int | Iterable[ClientId],
        *,
        validation: Callable[[Any], Pair] | None = None,
        test: Callable[[Any], Pair] | None = None,
        sizes: ArrayLike | None = None,
        central_test: Pair | None = None,
    ) -> Clients:
        """Clients whose examples a function makes or reads when asked; nothing is kept.

        Args:
            function: client id -> `Examples` or ``(x, y)``. It is asked anew whenever the client takes
                part, perhaps in another process, or by several threads at once while the round before is
                still training; it must answer the same every time.
            ids: how many clients (ids 0, 1, ...), or their ids; ``range(1_000_000)`` costs nothing.
            validation, test: the same for those parts.
            sizes: examples per client [client], if known; saves time where clients are weighted by size. A
                function that gives another number of examples is refused when asked.
            central_test: examples for the server to evaluate on.

        Example:
            >>> Clients.generated(lambda i: ([[float(i)]], [i % 2]), 1_000_000).train(999_999).inputs[0]
            array([[999999.]], dtype=float32)
        """
        names = _check_ids(range(int(ids)) if isinstance(ids, int | np.integer) else ids)
        known = None if sizes is None else _check_sizes(names, sizes)
        parts = [None if f is None else Part(partial(_ask, f, names)) for f in (function, validation, test)]
        training = Part(partial(_ask, function, names, sizes=known), known)
        return cls(names, training, parts[1], parts[2], _central(central_test))

    def train(self, position: int) -> Examples:
        """The training examples of the client at ``position``."""
        return self.training.read(self._check_position(position))

    def validation(self, position: int) -> Examples | None:
        """The validation examples of the client at ``position``; None if the population has none."""
        return None if self.validating is None else self.validating.read(self._check_position(position))

    def test(self, position: int) -> Examples | None:
        """The test examples of the client at ``position``; None if the population has none."""
        return None if self.testing is None else self.testing.read(self._check_position(position))

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        """Training examples per client, int64 [client]; None where nobody knows before reading."""
        return self.training.sizes

    @property
    def pool(self) -> tuple[Examples, Rows] | None:
        """The training pool and each client's rows in it, for resident populations; None otherwise."""
        return self.training.pool

    def split(self, *, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> Clients:
        """Set aside a part of every client's training examples for validation and for testing.

        The parts are disjoint and together all there was. Which example goes where depends on the
        seed, the client's *id* and its number of examples, not on the other clients. Of n examples
        test gets ``n * test`` rounded (halves up), then validation likewise, but training keeps at
        least one: a client of one example trains on it, and an empty client stays empty.

        Args:
            validation, test: shares of the client's examples, in [0, 1), together below 1. A share of
                0 leaves that part as it is.
            seed: another seed, another split.

        Raises:
            ConfigurationError: for shares that cannot be, or for a part that exists already.
        """
        shares = {"validation": validation, "test": test}
        self._check_still("split")
        self._check_shares(shares)
        piece = partial(cut, self.training, self.ids, shares=(validation, test), seed=seed)
        return replace(
            self,
            training=piece(which=0),
            validating=piece(which=1) if validation else self.validating,
            testing=piece(which=2) if test else self.testing,
        )

    def map(self, function: Function) -> Clients:
        """Apply a function to the examples of every client, part by part, and to the central test.

        The function sees one part of one client at a time, so nothing is pooled by it. A resident
        population is mapped at once and stays resident; a generated one is mapped when read. Empty
        parts of a resident population are not shown to the function.
        """
        self._check_still("map")
        central = None if self.central_test is None else applied(function, self.central_test)
        return self._each(lambda part: mapped(part, function), central)

    def poisoned(self, positions: ArrayLike, poison: Function) -> Clients:
        """Change the *training* examples of some clients, to simulate attackers; all else stays.

        A resident population stays resident: the changed examples are added to its pool.

        Args:
            positions: of the attackers.
            poison: ``Examples -> Examples``, as many as before, e.g. ``foedus.poison.flip_labels(10)``.

        Raises:
            DataError: for a position outside the population, or if the number of examples changes.

        Example:
            >>> clients = Clients.of({"a": ([[0.0]], [0]), "b": ([[1.0]], [1])})
            >>> clients.poisoned([1], lambda e: Examples(e.inputs, 1 - e.targets)).train(1).targets.tolist()
            [0]
        """
        self._check_still("poisoned")
        rows = np.unique(np.asarray(positions, np.int64).reshape(-1))
        for position in rows.tolist():
            self._check_position(position)
        return replace(self, training=mapped_some(self.training, poison, rows))

    def map_fitted(self, fit: Fit) -> Clients:
        """Fit a function to every client's training examples and apply it to all parts of that client.

        For preprocessing within each client (its own scale, its own fill-in values). The central test
        belongs to no client: it is treated as a site of its own, fitted to itself.
        """
        self._check_still("map_fitted")
        site = self.central_test
        central = None if site is None else applied(fit(site), site)
        return self._each(lambda part: fitted(self.training, part, fit), central)

    def subset(self, positions: ArrayLike) -> Clients:
        """The clients at these positions, in this order, under their old ids.

        Raises:
            DataError: for a position outside the population, twice the same, or none at all.
        """
        self._check_still("subset")
        rows = np.asarray(positions)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            kind = f"{rows.dtype}{list(rows.shape)}"
            raise DataError(f"Positions are a list of whole numbers, not {kind}. For a mask, np.flatnonzero.")
        rows = rows.astype(np.int64)
        for position in rows[(rows < 0) | (rows >= len(self))]:
            self._check_position(int(position))
        ids = _check_ids([self.ids[p] for p in rows.tolist()])
        return replace(self._each(lambda part: chosen(part, rows), self.central_test), ids=ids)

    def with_test(self, central_test: Pair | None) -> Clients:
        """The same clients with other examples for the server to evaluate on (None: with none)."""
        self._check_still("with_test")
        return replace(self, central_test=_central(central_test))

    def pooled_examples(self) -> Examples:
        """The training examples of all clients together, for a comparison with centralised training.

        A generated population is read whole: this is for populations that fit into memory.
        """
        if self.pool is not None:
            examples, rows = self.pool
            return examples.take(rows.values)
        return Examples.concat([self.train(i) for i in range(len(self))])

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the population does; checkpoints compare them.

        Covers ids, sizes, rows, shapes and dtypes, and the bytes of a sample of examples. Changes of
        a few values only may go unnoticed: this tells data sets apart, it does not seal them.
        """
        streamed = "" if self.later is None else f"{self.later.label}{self.later.code}"
        digest = hashlib.sha256(f"{len(self)}|{self.central_test!r}{streamed}".encode())
        digest.update(repr(self.ids if isinstance(self.ids, range) else tuple(self.ids)).encode())
        for part in (self.training, self.validating, self.testing):
            digest.update(b"none" if part is None else _digest_part(part, len(self)))
        if self.central_test is not None:
            digest.update(self.central_test.digest())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        kind = "generated" if self.pool is None else "resident"
        if self.later is not None:
            return f"Clients({len(self):,} clients, {kind}, {self.later.label})"
        if self.sizes is None:
            return f"Clients({len(self):,} clients, generated)"
        return f"Clients({len(self):,} clients, {int(self.sizes.sum()):,} examples, {kind})"

    def _each(self, change: Callable[[Part], Part], central_test: Examples | None) -> Clients:
        """The same clients with every part changed."""
        validating, testing = (None if p is None else change(p) for p in (self.validating, self.testing))
        return Clients(self.ids, change(self.training), validating, testing, central_test)

    def _check_position(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise DataError(
                f"There is no client at position {position}: the population has {len(self)}, at positions "
                f"0 to {len(self) - 1}."
            )
        return int(position)

    def _check_shares(self, shares: dict[str, float]) -> None:
        numbers = all(isinstance(s, int | float | np.number) and not isinstance(s, bool) for s in shares.values())
        if not (numbers and all(0 <= s < 1 for s in shares.values()) and sum(shares.values()) < 1):
            raise ConfigurationError(
                f"split(validation={shares['validation']!r}, test={shares['test']!r}) cannot be: each share is a "
                "number in [0, 1), and together they leave something to train on."
            )
        for name, part in (("validation", self.validating), ("test", self.testing)):
            if shares[name] and part is not None:
                raise ConfigurationError(
                    f"These clients have {name} examples already. Write split({name}=0, ...) to keep them."
                )


def _arrived(whole: Clients, round: int, *, per_round: int, window: int | None) -> Clients:
    return replace(whole, training=arrived(whole.training, round, per_round=per_round, window=window))


def _ask(
    function: Callable[[Any], Pair],
    ids: Sequence[ClientId],
    position: int,
    *,
    sizes: NDArray[np.int64] | None = None,
) -> Examples:
    client = ids[position]
    try:
        made = function(client)
    except FoedusError:
        raise
    except Exception as error:
        raise DataError(f"The data of client {client!r} could not be read: {type(error).__name__}: {error}") from error
    examples = _examples(made, f"the function for client {client!r}")
    if sizes is not None and len(examples) != sizes[position]:
        raise DataError(
            f"The function for client {client!r} gave {len(examples)} examples, and sizes says {sizes[position]}. "
            "Correct the sizes, or leave them out."
        )
    return examples


def _dealt(ids: Sequence[ClientId], pool: Examples, rows: Iterable[ArrayLike]) -> Part:
    held = Rows.of(rows)
    _same_count(ids, held)
    _check_rows(held, len(pool), ids)
    return resident(pool, held)


def _gathered(ids: Sequence[ClientId], given: Mapping[ClientId, Pair]) -> Part:
    """One pool of the examples of all clients; a client that is not in ``given`` is empty."""
    known = set(ids)
    unknown = [i for i in given if i not in known]
    if unknown:
        raise DataError(f"There are examples for client {unknown[0]!r}, who has no training data.")
    parts = {i: _examples(given[i], f"client {i!r}") for i in ids if i in given}
    if not parts:
        raise DataError("No client has any examples in this part. Leave the argument out, or write None.")
    _check_shapes(parts)
    return laid_out(list(parts.values()), [len(parts[i]) if i in parts else 0 for i in ids])


def _check_shapes(parts: Mapping[ClientId, Examples]) -> None:
    first_id, first = next(iter(parts.items()))
    for client, examples in parts.items():
        if examples.shapes != first.shapes:
            raise DataError(
                f"Clients must have examples of one shape, and client {client!r} has {examples!r} where "
                f"client {first_id!r} has {first!r}. Choose the same columns everywhere, or pad."
            )


def _examples(value: Any, whose: str) -> Examples:
    if isinstance(value, Examples):
        return value
    if isinstance(value, tuple) and len(value) == 2:
        try:
            return Examples.of(*value)
        except DataError as error:
            raise DataError(f"In the data of {whose}: {error}") from None
    raise DataError(f"The data of {whose} must be Examples or a pair (x, y), and is of type {type(value).__name__}.")


def _central(value: Pair | None) -> Examples | None:
    return None if value is None else _examples(value, "the central test")


def _check_ids(ids: Iterable[Any]) -> Sequence[ClientId]:
    if not isinstance(ids, range):
        ids = tuple(int(i) if isinstance(i, np.integer) else str(i) if isinstance(i, str) else i for i in ids)
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int | str):
                told = f"{reprlib.repr(i)} is of type {type(i).__name__}"
                raise DataError(f"Client ids are whole numbers or texts, and {told}.")
        if len(set(ids)) < len(ids):
            raise DataError(f"Client ids must differ, and {_doubles(ids)} occur more than once.")
    if not ids:
        raise DataError("A population needs at least one client, and there is none.")
    return ids


def _doubles(ids: Sequence[ClientId]) -> str:
    seen: set[ClientId] = set()
    doubles = dict.fromkeys(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
    return ", ".join(repr(i) for i in list(doubles)[:5]) + (", ..." if len(doubles) > 5 else "")


def _same_count(ids: Sequence[ClientId], given: Sequence[Any] | Array) -> None:
    if len(ids) != len(given):
        raise DataError(f"There are {len(ids)} client ids for the data of {len(given)} clients.")


def _check_sizes(ids: Sequence[ClientId], sizes: ArrayLike) -> NDArray[np.int64]:
    known = np.asarray(sizes)
    if known.ndim != 1 or known.dtype.kind not in "iu" or (known < 0).any():
        raise DataError("sizes is a list of whole numbers of at least 0, one per client.")
    _same_count(ids, known)
    return known.astype(np.int64)


def _check_rows(rows: Rows, length: int, ids: Sequence[ClientId]) -> None:
    wrong = np.flatnonzero((rows.values < 0) | (rows.values >= length))
    if len(wrong):
        position = int(np.searchsorted(rows.offsets, wrong[0], side="right")) - 1
        raise DataError(
            f"Client {ids[position]!r} has row {int(rows.values[wrong[0]])}, and the pool has rows 0 to {length - 1}."
        )


def _digest_part(part: Part, clients: int) -> bytes:
    if part.pool is not None:
        pool, rows = part.pool
        return hashlib.sha256(pool.digest() + rows.values.tobytes() + rows.offsets.tobytes()).digest()
    return b"".join(part.read(position).digest() for position in sorted({0, clients // 2, clients - 1}))

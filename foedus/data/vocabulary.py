"""Categories and words over clients that do not show their lists: a vocabulary from sums alone.

The difficulty is that the server does not know which words there are, so it cannot ask for their counts. A
sum can tell nevertheless (an invertible Bloom lookup table: Eppstein et al., "What's the difference?",
SIGCOMM 2011). Every client throws each of its words into one bucket of each of three tables, chosen by a
hash of the word, and a bucket holds sums: of clients, of rows, of a checksum, and of the word's bytes. In
the sum over all clients a bucket with a single word in it gives the word away: bytes divided by clients.
It is then taken out of the other tables, which leaves more buckets with a single word, until all are empty.
If that gets stuck, the tables were too small and are made anew at twice the size.

So the words and their counts come out, and not who has which. (The server learns rare words too; those of
fewer than ``minimum_clients`` clients are dropped from the result, not hidden from the server.)

Not here: numbers (`preprocess.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator
from foedus.core.population import ClientId, Clients, Examples
from foedus.data.preprocess import Filling, added
from foedus.errors import ConfigurationError, DataError

__all__ = ["OneHot", "Vocabulary", "federated_mode_filling", "federated_vocabulary", "one_hot"]

Floats: TypeAlias = NDArray[np.float64]

_TABLES: Final = 3
_FIRST_SIZE: Final = 64  # buckets per table
_LARGEST: Final = 1 << 16
_CLIENTS, _ROWS, _CHECK, _BYTES = 0, 1, 2, 3  # what a bucket holds, in this order


class Vocabulary(NamedTuple):
    """Words, numbered from 0 in sorted order.

    Attributes:
        words: the words.
        clients: how many clients have each of them; empty if the words were written down by hand.
        rows: how often each occurs in all.

    Example:
        >>> Vocabulary(("no", "yes")).spread(["yes", "perhaps"]).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """

    words: tuple[str, ...]
    clients: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()

    def codes(self, values: Iterable[Any]) -> NDArray[np.int64]:
        """The number of each value, int64 [value]; ``len(words)`` for one that is not in the vocabulary.

        Example:
            >>> Vocabulary(("no", "yes")).codes(["yes", "no", "perhaps"])
            array([1, 0, 2])
        """
        numbers = {word: number for number, word in enumerate(self.words)}
        return np.array([numbers.get(str(v), len(self.words)) for v in values], np.int64)

    def spread(self, values: Iterable[Any]) -> NDArray[np.float32]:
        """One column per word, 1 where the value is that word, float32 [value, word]; all 0 if it is none."""
        return np.eye(len(self.words) + 1, len(self.words), dtype=np.float32)[self.codes(values)]


class OneHot(NamedTuple):
    """Columns of category numbers spread to one column per category; others stay, in their order.

    Attributes:
        categories: column -> its values, each of which gets a column, 0 or 1. A value that is not
            listed, or missing, is 0 in all of them.
        input: which of the model's inputs, [example, column].

    Example:
        >>> OneHot({0: (1.0, 2.0)}).apply(Examples.of([[2.0, 0.5]], [1])).inputs[0].tolist()
        [[0.0, 1.0, 0.5]]
    """

    categories: Mapping[int, tuple[float, ...]]
    input: int = 0

    def apply(self, examples: Examples) -> Examples:
        """The examples with that input spread."""
        x = examples.inputs[self.input]
        columns = [
            x[:, i, None] == np.array(self.categories[i]) if i in self.categories else x[:, i, None]
            for i in range(x.shape[1])
        ]
        inputs = list(examples.inputs)
        inputs[self.input] = np.concatenate([c.astype(x.dtype) for c in columns], axis=1)
        return replace(examples, inputs=tuple(inputs))


def one_hot(categories: Mapping[int, Sequence[float]], *, input: int = 0) -> OneHot:
    """Spread columns of category numbers, listed by column number with the values that they take.

    Example:
        >>> spread = one_hot({1: [1, 2, 3]})
        >>> spread.apply(Examples.of([[0.5, 3], [0.7, float("nan")]], [0, 1])).inputs[0]
        array([[0.5, 0. , 0. , 1. ],
               [0.7, 0. , 0. , 0. ]], dtype=float32)
    """
    if not categories:
        raise ConfigurationError("one_hot needs at least one column, e.g. one_hot({2: [1, 2, 3, 4]}).")
    return OneHot({column: tuple(values) for column, values in categories.items()}, input)


def federated_vocabulary(
    values: Mapping[ClientId, Iterable[Any]],
    *,
    minimum_clients: int = 1,
    longest: int = 40,
    aggregator: Aggregator | None = None,
) -> Vocabulary:
    """The words that occur among the clients, from sums; see the module for how, and what is revealed.

    Args:
        values: client id -> its values (words, categories), as often as they occur; None is missing.
        minimum_clients: words that fewer clients have are left out.
        longest: bytes that a word may have in UTF-8.
        aggregator: adds up; default ``mean(weighted=False)``.

    Raises:
        DataError: for a longer word, or for more words than the largest table holds (about 150,000).

    Example:
        >>> federated_vocabulary({"a": ["red", "green", "red"], "b": ["blue", "green"]})
        Vocabulary(words=('blue', 'green', 'red'), clients=(1, 2, 1), rows=(1, 2, 2))
    """
    counted = [_counted(own, longest) for own in values.values()]
    size = _FIRST_SIZE
    while size <= _LARGEST:
        total = added((_sketch(counts, size, longest) for counts in counted), aggregator)
        found = _peel(np.rint(total).reshape(_TABLES, size, _BYTES + longest))
        if found is not None:
            kept = sorted(word for word, (clients, _) in found.items() if clients >= minimum_clients)
            numbers = [found[word] for word in kept]
            return Vocabulary(tuple(kept), tuple(n for n, _ in numbers), tuple(n for _, n in numbers))
        size *= 2
    raise DataError(f"There are too many different words for {_TABLES} tables of {_LARGEST} buckets.")


def federated_mode_filling(
    clients: Clients, columns: Sequence[int], *, input: int = 0, aggregator: Aggregator | None = None
) -> Filling:
    """Fill in the most frequent value over all clients' training examples (the least of equals).

    For columns of few different values, such as category numbers; others are left as they are.

    Args:
        columns: the columns to fill.
        input: which of the model's inputs, [example, column].
        aggregator: as for `federated_vocabulary`.

    Example:
        >>> clients = Clients.of({"a": ([[1.0], [np.nan]], [0, 1]), "b": ([[2.0], [2.0]], [1, 0])})
        >>> federated_mode_filling(clients, [0]).values.tolist()
        [2.0]
    """
    tables = [clients.train(i).inputs[input] for i in range(len(clients))]
    values = np.full(tables[0].shape[1], np.nan)
    for column in columns:
        known: dict[ClientId, list[float]] = {
            i: x[~np.isnan(x[:, column]), column].tolist() for i, x in enumerate(tables)
        }
        found = federated_vocabulary(known, aggregator=aggregator)
        ranked = sorted(zip(found.words, found.rows, strict=True), key=lambda f: (-f[1], float(f[0])))
        values[column] = float(ranked[0][0]) if ranked else np.nan
    return Filling(values, input)


def _counted(values: Iterable[Any], longest: int) -> dict[bytes, int]:
    """How often each word occurs at one client."""
    counts = Counter(str(v).encode() for v in values if v is not None)
    for word in counts:
        if len(word) > longest or b"\0" in word:
            raise DataError(
                f"The word {word.decode()!r} has {len(word)} bytes (or a zero byte in it), and "
                f"longest={longest}. Is this a column of categories?"
            )
    return dict(counts)


def _sketch(counts: Mapping[bytes, int], size: int, longest: int) -> Floats:
    """One client's tables, [table * bucket * field]."""
    tables = np.zeros((_TABLES, size, _BYTES + longest))
    for word, rows in counts.items():
        tables[np.arange(_TABLES), _buckets(word, size)] += _entry(word, 1, rows, longest)
    return tables.ravel()


def _peel(tables: Floats) -> dict[str, tuple[int, int]] | None:
    """word -> (clients, rows), from the sum of all sketches [table, bucket, field]; None if it gets stuck.

    Empties ``tables``.
    """
    _, size, fields = tables.shape
    found: dict[str, tuple[int, int]] = {}
    waiting = [tuple(place) for place in np.argwhere(tables[:, :, _CLIENTS] > 0)]
    while waiting:
        bucket = tables[waiting.pop()]
        word = _single(bucket)
        if word is None:
            continue
        clients, rows = int(bucket[_CLIENTS]), int(bucket[_ROWS])
        places = list(zip(range(_TABLES), _buckets(word, size).tolist(), strict=True))
        for place in places:
            tables[place] -= _entry(word, clients, rows, fields - _BYTES)
        found[word.decode()] = clients, rows
        waiting.extend(places)  # with this word gone another may stand alone there
    return None if tables.any() else found


def _single(bucket: Floats) -> bytes | None:
    """The word of a bucket with exactly one word in it, else None."""
    clients = bucket[_CLIENTS]
    if clients <= 0:
        return None
    letters = bucket[_BYTES:] / clients
    if ((letters != np.rint(letters)) | (letters < 0) | (letters > 255)).any():
        return None
    word = letters.astype(np.uint8).tobytes().rstrip(b"\0")
    return word if _check(word) * clients == bucket[_CHECK] else None


def _entry(word: bytes, clients: int, rows: int, longest: int) -> Floats:
    """What a word adds to its bucket, [field]."""
    letters = np.frombuffer(word.ljust(longest, b"\0"), np.uint8).astype(np.float64)
    return np.concatenate([[clients, rows, clients * _check(word)], clients * letters])


def _buckets(word: bytes, size: int) -> NDArray[np.int64]:
    """The bucket of a word in each table, [table]; another size deals anew."""
    digest = hashlib.blake2b(word, digest_size=8 * _TABLES, salt=size.to_bytes(4, "little")).digest()
    return (np.frombuffer(digest, "<u8") % np.uint64(size)).astype(np.int64)


def _check(word: bytes) -> int:
    """A checksum of 22 bits: sums of it over a million clients stay below 2**42."""
    return int.from_bytes(hashlib.blake2b(word, digest_size=4, person=b"check").digest(), "little") >> 10

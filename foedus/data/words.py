"""Texts as bags of words: sparse examples of which words occur, in numpy, without an array [text, word].

`shakespeare_questions` is a data set of such examples, with very uneven natural clients.

Not here: models of them (`foedus.sparse_logistic`), a vocabulary found without pooling what clients say
(`foedus.data.federated_vocabulary`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.population import Examples
from foedus.core.sparse_rows import sparse_rows
from foedus.data.dataset import Dataset
from foedus.data.sources import read
from foedus.errors import ConfigurationError

__all__ = ["bag_of_words", "frequent_words", "shakespeare_questions", "words_of"]

_WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE: Final = re.compile(r"[^.?!]*[.?!]")


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters; an apostrophe within a word belongs to it.

    Example:
        >>> words_of("Who's there? Nay, answer me.")
        ["who's", 'there', 'nay', 'answer', 'me']
    """
    return _WORD.findall(text.lower())


def frequent_words(texts: Iterable[str], most: int) -> tuple[str, ...]:
    """The most frequent words of some texts, the most frequent first; equally frequent ones by the alphabet.

    Example:
        >>> frequent_words(["to be, or not to be"], 3)
        ('be', 'to', 'not')
    """
    check_whole("most", most)
    counts = Counter(chain.from_iterable(map(words_of, texts)))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:most])


def bag_of_words(texts: Sequence[str], vocabulary: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which words of a vocabulary every text has, as sparse inputs with a value of 1.

    Args:
        texts: one per example.
        vocabulary: the words, in small letters; their places are the features. Other words are left out.

    Returns:
        indices int32 [text, place] and values float32 [text, place], see `foedus.sparse_rows`; as wide as the text of
        most different words.

    Raises:
        ConfigurationError: a word stands twice in the vocabulary.

    Example:
        >>> indices, values = bag_of_words(["to be, or not to be", "be!"], ["be", "not", "to"])
        >>> indices.tolist(), values.tolist()
        ([[0, 1, 2], [0, 0, 0]], [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    """
    places = {word: place for place, word in enumerate(vocabulary)}
    if len(places) < len(vocabulary):
        word = next(w for place, w in enumerate(vocabulary) if places[w] != place)
        raise ConfigurationError(f"The word {word!r} stands twice in the vocabulary.")
    rows = [sorted({places[word] for word in words_of(text) if word in places}) for text in texts]
    offsets = np.cumsum([0, *map(len, rows)])
    indices = np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1]))
    return sparse_rows(indices, np.ones(len(indices), np.float32), offsets=offsets)


def shakespeare_questions(*, words: int = 10_000, longest: int = 40) -> Dataset:
    """Which sentences of 37 plays are questions, from the words alone: sparse inputs, int64 [n] 0 or 1.

    Natural clients: ``shakespeare_questions().clients()`` gives the roles that speak, named "play/ROLE". Of each the
    first 80 % of the sentences (rounded down) are for training and the rest, at least one, for testing. A sentence ends
    with a full stop, a question mark or an exclamation mark, which are not among the words.

    Args:
        words: how many features: the most frequent words of all training sentences.
        longest: sentences of more different words are left out, since all rows are as wide as the fullest.

    Raises:
        DataNotFound: the file is not there; see `shakespeare`.
        DataCorrupt: the file is damaged, or another one.

    Example:
        >>> shakespeare_questions().clients()  # doctest: +SKIP
        Clients(1,170 clients, 40,915 examples, resident)
    """
    check_whole("words", words)
    check_whole("longest", longest)
    said: dict[str, list[str]] = {}
    for record in read("shakespeare/speeches.jsonl.gz").splitlines():
        speech = json.loads(record)
        sentences = _SENTENCE.findall(" ".join(speech["lines"]))
        kept = [s for s in sentences if 0 < len(set(words_of(s))) <= longest]
        said.setdefault(f"{speech['play']}/{speech['role']}", []).extend(kept)
    roles = {role: sentences for role, sentences in said.items() if len(sentences) > 1}
    first = {role: sentences[: len(sentences) * 4 // 5] for role, sentences in roles.items()}
    rest = {role: sentences[len(sentences) * 4 // 5 :] for role, sentences in roles.items()}
    vocabulary = frequent_words(chain.from_iterable(first.values()), words)
    (train, trained), (test, tested) = _questions(first, vocabulary), _questions(rest, vocabulary)
    return Dataset(
        "shakespeare_questions", train, test, classes=("statement", "question"), columns=vocabulary,
        groups={"role": trained}, test_groups={"role": tested}, about="Sentences of Shakespeare's plays by role",
    )  # fmt: skip


def _questions(sentences: dict[str, list[str]], vocabulary: Sequence[str]) -> tuple[Examples, NDArray[Any]]:
    """The examples of all roles, and whose each one is."""
    texts = list(chain.from_iterable(sentences.values()))
    targets = np.array([text.endswith("?") for text in texts], np.int64)
    return Examples.of(bag_of_words(texts, vocabulary), targets), np.repeat(
        list(sentences), [len(own) for own in sentences.values()]
    )

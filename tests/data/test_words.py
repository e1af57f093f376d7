"""Texts as bags of words."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus import data
from foedus.data import sources
from foedus.data.words import words_of
from foedus.errors import ConfigurationError

VOCABULARY = ("to", "be", "or", "not", "o'er")
TEXTS = st.lists(
    st.lists(st.sampled_from([*VOCABULARY, "unknown", "TO", "be,", "?"]), max_size=9).map(" ".join), max_size=6
)


@given(TEXTS)
def test_a_bag_has_the_words_that_are_in_the_text(texts: list[str]) -> None:
    indices, values = data.bag_of_words(texts, VOCABULARY)
    assert indices.dtype == np.int32
    for text, places, there in zip(texts, indices, values, strict=True):
        wanted = {word for word in VOCABULARY if word in text.lower().replace(",", "").split()}
        assert {VOCABULARY[j] for j, x in zip(places, there, strict=True) if x} == wanted
        assert there.sum() == len(wanted)


def test_words_keep_their_apostrophes_and_lose_everything_else() -> None:
    assert words_of("O'er th' sea--'tis 2 late_r, naïve!") == ["o'er", "th", "sea", "tis", "late", "r", "naïve"]


def test_frequent_words_are_in_a_fixed_order() -> None:
    assert data.frequent_words(["b a", "c b", "d"], 3) == ("b", "a", "c")


def test_a_word_that_stands_twice_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'be' stands twice"):
        data.bag_of_words(["be"], ["be", "to", "be"])


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    said = [
        ("R", ["Who is there? Nay, answer", "me."]), ("R", ["Stand! Who? No.", "Not finished"]), ("S", ["Alone."]),
    ]  # fmt: skip
    records = [json.dumps({"play": "p", "role": role, "lines": lines}) for role, lines in said]
    content, path = gzip.compress("\n".join(records).encode()), "shakespeare/speeches.jsonl.gz"
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / path).write_bytes(content)
    monkeypatch.setenv("FOEDUS_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "SOURCES", (sources.Source(path, hashlib.sha256(content).hexdigest()),))
    return data.shakespeare_questions(words=4, longest=3)


def test_sentences_are_questions_or_not(plays: data.Dataset) -> None:
    """Of R's five sentences the first four are for training; the vocabulary is of those alone."""
    assert plays.clients().ids == ("p/R",)  # S has a single sentence
    assert plays.columns == ("who", "answer", "is", "me")
    assert plays.train.targets.tolist() == [1, 0, 0, 1]
    assert plays.test is not None
    assert plays.test.targets.tolist() == [0]
    assert plays.train.inputs[0].tolist() == [[0, 2], [1, 3], [0, 0], [0, 0]]
    assert plays.train.inputs[1].sum(1).tolist() == [2, 2, 0, 1]


@pytest.mark.slow
def test_shakespeares_questions(data_folder: object) -> None:
    clients = data.shakespeare_questions().clients()
    assert len(clients) == 1170
    assert clients.sizes is not None
    assert clients.sizes.sum() == 40_915
    assert round(float(clients.pooled_examples().targets.mean()), 3) == 0.209

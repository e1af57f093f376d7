"""Consent: the latest record that fits decides; withdrawal says what it cannot undo."""

from __future__ import annotations

from pathlib import Path

import pytest

from foedus.errors import ConfigurationError
from foedus.net.owner.consent import WITHDRAWAL, Consents, words

A, B = "https://a.example", "https://b.example"


@pytest.fixture
def consents(tmp_path: Path) -> Consents:
    return Consents(tmp_path / "consent.jsonl")


def test_without_a_record_there_is_none(consents: Consents) -> None:
    assert not consents.holds(A)
    assert consents.records() == []


def test_it_is_for_one_server_and_the_latest_decides(consents: Consents) -> None:
    consents.give(A, who="Dr Weiss", when=0.0)
    assert consents.holds(A, "task")
    assert not consents.holds(B)
    consents.withdraw(A, who="Dr Weiss", when=1.0)
    assert not consents.holds(A)
    consents.give(A, who="Dr Weiss", when=2.0)
    assert consents.holds(A)
    assert [record.given for record in consents.records()] == [True, False, True]


def test_it_may_be_for_one_task_only(consents: Consents) -> None:
    consents.give(A, who="Dr Weiss", when=0.0, task="aa")
    assert consents.holds(A, "aa")
    assert not consents.holds(A, "bb")
    assert not consents.holds(A)
    consents.give(A, who="Dr Weiss", when=1.0)
    consents.withdraw(A, who="Dr Weiss", when=2.0, task="bb")
    assert consents.holds(A, "aa")
    assert not consents.holds(A, "bb")
    consents.withdraw(A, who="Dr Weiss", when=3.0)
    assert not consents.holds(A, "aa")


def test_the_words_that_were_agreed_to_are_kept(consents: Consents) -> None:
    record = consents.give(A, who="Dr Weiss", when=0.0, data="heart")
    assert record == consents.records()[0]
    assert record.words == words(A, data="heart")
    assert "heart" in record.words
    assert record.when == "1970-01-01T00:00:00Z"
    assert "cannot undo" in consents.withdraw(A, who="x", when=0.0).words
    assert "sums and models already" in WITHDRAWAL


def test_nobody_cannot_consent(consents: Consents) -> None:
    with pytest.raises(ConfigurationError, match="who consents"):
        consents.give(A, who="  ", when=0.0)


def test_a_damaged_record_is_told_with_its_line(consents: Consents, tmp_path: Path) -> None:
    consents.give(A, who="Dr Weiss", when=0.0)
    with open(tmp_path / "consent.jsonl", "a") as file:
        file.write('{"server": 1}\n')
    with pytest.raises(ConfigurationError, match="line 2"):
        consents.holds(A)

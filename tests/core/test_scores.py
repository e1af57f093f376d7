"""Scores beside plain formulas; quarantine beside a plain count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.core.scores import History, Score, quarantine, score


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**32))
def test_scores_are_norms_and_cosines(clients: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, current, previous = rng.normal(size=(clients, size)), rng.normal(size=size), rng.normal(size=size)
    found = score({9 - i: row for i, row in enumerate(rows)}, current, previous, losses={9: 0.25})
    assert list(found) == sorted(found)
    for i, row in enumerate(rows):
        norm = np.linalg.norm(row)
        expected = [
            norm,
            row @ previous / norm / np.linalg.norm(previous),
            row @ current / norm / np.linalg.norm(current),
        ]
        np.testing.assert_allclose(found[9 - i][:3], expected, atol=1e-12)
        assert found[9 - i].loss == 0.25 if i == 0 else math.isnan(found[9 - i].loss)


def test_without_a_direction_there_is_no_cosine() -> None:
    found = score({1: np.zeros(2), 2: np.ones(2)}, np.ones(2))
    assert math.isnan(found[1].current)
    assert math.isnan(found[2].previous)
    assert score({}, np.ones(2)) == {}


def test_a_history_survives_a_checkpoint() -> None:
    history = (
        History.empty().after(1, {5: Score(1, 0, 0.5), 2: Score(2, 0, -0.5)}).after(3, {}).after(4, {5: Score(3, 0, 0)})
    )
    again = History.of_state({n: a.copy() for n, a in history.state().items()})
    assert [s.norm for s in again.of(5)] == [1, 3]
    assert again.rounds.tolist() == [1, 1, 4]
    assert again.clients.tolist() == [2, 5, 5]
    assert History.of_state({}).of(5) == []


def plainly(visits: list[tuple[int, int, float]], now: int, after: int, rounds: int) -> list[int]:
    """Who is away now: walk through every client's visits."""
    away = []
    for client in sorted({c for c, _, _ in visits}):
        bad, until = 0, 0
        for _, at, value in (v for v in visits if v[0] == client):
            bad = bad + 1 if value < 0 else 0
            if bad == after:
                bad, until = 0, at + rounds
        if now <= until:
            away.append(client)
    return away


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1.0, 1.0, math.nan])), max_size=3), max_size=7),
       st.integers(1, 3), st.integers(1, 5))  # fmt: skip
def test_quarantine_is_for_those_who_are_suspicious_often_enough(
    record: list[list[tuple[int, float]]], after: int, rounds: int
) -> None:
    history, visits = History.empty(), []
    for at, found in enumerate(record, start=1):
        scores = {c: Score(1.0, 0.0, value) for c, value in found}
        history = history.after(at, scores)
        visits += [(c, at, scores[c].current) for c in sorted(scores)]
    for now in range(1, len(record) + 8):
        rule = quarantine(after=after, rounds=rounds)
        assert rule.away(history, now).tolist() == plainly(visits, now, after, rounds)


def test_any_figure_can_be_what_counts() -> None:
    history = History.empty().after(1, {0: Score(9.0, 1, 1, loss=2.0), 1: Score(1.0, 1, 1, loss=0.0)})
    assert quarantine(after=1, below=-1.0, of=lambda s: -s.loss).away(history, 2).tolist() == [0]
    assert quarantine(after=1, below=-5.0, of=lambda s: -s.norm).away(history, 2).tolist() == [0]

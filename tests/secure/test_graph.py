"""Degree and threshold follow from what is to be withstood: the published figures, the bounds by other means, the
graph.
"""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.errors import ConfigurationError, NoGuarantee
from foedus.secure.graph import MOST_WITH_ALL, Withstand, ring

# Degrees for 40 bits of security and 20 of correctness, where as many are corrupt as drop out.
DEGREES = {
    100: {0.05: 30, 0.1: 42, 0.2: 72, 1 / 3: 99},
    1000: {0.05: 32, 0.1: 46, 0.2: 98, 1 / 3: 290},
    10**4: {0.05: 34, 0.1: 54, 0.2: 120, 1 / 3: 434},
    10**6: {0.05: 38, 0.1: 64, 0.2: 144, 1 / 3: 536},
}
CASES = [(n, share, degree) for n, row in DEGREES.items() for share, degree in row.items()]


@pytest.mark.parametrize(("clients", "share", "degree"), CASES)
def test_degrees_are_the_published_ones(clients: int, share: float, degree: int) -> None:
    found = Withstand(clients=clients, corrupt=share, dropouts=share).parameters
    assert found.degree == degree


def tail(population: int, marked: int, drawn: int, least: int) -> Fraction:
    """P[at least so many of those drawn are marked], in exact arithmetic."""
    ways = sum(
        math.comb(marked, x) * math.comb(population - marked, drawn - x)
        for x in range(max(least, 0), min(marked, drawn) + 1)
        if drawn - x <= population - marked
    )
    return Fraction(ways, math.comb(population, drawn))


def withstood(wanted: Withstand, degree: int, threshold: int) -> bool:
    """The three conditions, said anew in exact arithmetic."""
    n, gamma, delta = wanted.clients, Fraction(wanted.share), Fraction(wanted.dropouts)
    apart = n * (gamma + delta) ** (degree // 2)
    seen = n * tail(n - 1, wanted.corrupted, degree, threshold)
    missed = n * (1 - tail(n - 1, n - 1 - wanted.lost, degree, threshold))
    return apart + seen <= Fraction(2) ** -40 and missed <= Fraction(2) ** -20


@pytest.mark.parametrize(("clients", "share"), [(100, 0.05), (100, 0.1), (100, 0.2), (1000, 0.05), (1000, 0.1)])
def test_the_degree_withstands_it_and_the_next_smaller_one_does_not(clients: int, share: float) -> None:
    wanted = Withstand(clients=clients, corrupt=share, dropouts=share)
    degree, threshold = wanted.parameters
    assert withstood(wanted, degree, threshold)
    assert not any(withstood(wanted, degree - 2, t) for t in range(1, degree))


@pytest.mark.parametrize(("clients", "asked", "share"), [(200, 101, 0.05), (1000, 600, 0.05), (300, 170, 0.1)])
def test_where_fewer_are_asked_as_many_may_collude(clients: int, asked: int, share: float) -> None:
    """The server may ask all that collude with it, and leave out others: degree and threshold hold for that number."""
    promised = Withstand(clients=clients, corrupt=share, dropouts=share)
    wanted = promised.among(asked)
    assert (wanted.clients, wanted.corrupted, wanted.dropouts) == (asked, promised.corrupted, share)
    assert wanted.share >= promised.corrupted / asked
    degree, threshold = wanted.parameters
    assert degree < asked - 1
    assert withstood(wanted, degree, threshold)
    assert not any(withstood(wanted, degree - 2, t) for t in range(1, degree))
    as_a_share = Withstand(clients=asked, corrupt=share, dropouts=share).parameters
    assert not withstood(wanted, *as_a_share), "the same share of fewer would not have done"


@given(st.integers(3, 300), st.data())
def test_the_number_stays_however_many_are_asked_or_it_is_refused(clients: int, data: st.DataObject) -> None:
    share, malicious = data.draw(st.floats(0, 0.4)), data.draw(st.booleans())
    asked = data.draw(st.integers(3, clients))
    try:
        promised = Withstand(clients=clients, corrupt=share, dropouts=0.1, malicious=malicious)
    except NoGuarantee:
        return
    try:
        wanted = promised.among(asked)
    except NoGuarantee:
        lost = math.floor(0.1 * asked)
        needed = (asked + promised.corrupted) // 2 + 1 if malicious else max(promised.corrupted + 1, 2)
        assert promised.corrupted > asked - 2 or needed > asked - lost
        return
    assert wanted.corrupted == promised.corrupted
    _, threshold = wanted.parameters
    assert threshold > promised.corrupted or wanted.parameters.degree < asked - 1
    assert not malicious or 2 * threshold > asked + promised.corrupted


def test_a_share_is_rounded_down_and_is_never_nobody() -> None:
    found = [Withstand(clients=n, corrupt=0.1).corrupted for n in (3, 9, 10, 19, 20, 100)]
    assert found == [1, 1, 1, 1, 2, 10]
    assert Withstand(clients=9, corrupt=0.0).corrupted == 0
    assert Withstand(clients=9, corrupt=0.1, dropouts=0.0, malicious=True).parameters.threshold == 6


def test_so_few_that_what_was_promised_cannot_be_withstood_are_refused() -> None:
    promised = Withstand(clients=30, corrupt=0.2, dropouts=0.2)
    with pytest.raises(NoGuarantee, match=r"7 clients are asked, and all 6 that may collude by .*clients=30, .*6 of 7"):
        promised.among(7)
    with pytest.raises(NoGuarantee, match="it would take 17 clients to put a secret together, and 16 are left"):
        Withstand(clients=40, corrupt=0.3, dropouts=0.2, malicious=True).among(20)


def test_twice_the_logarithm_is_not_enough() -> None:
    """k = 2·log₂ n, as it is often written, leaves one graph in 2^9.6 (n = 100) or 2^13.3 (n = 1000) in two parts."""
    for clients, bits in ((100, 9.6), (1000, 13.3)):
        degree = 2 * math.ceil(math.log2(clients))
        assert abs(-math.log2(clients * 0.2 ** (degree / 2)) - bits) < 0.1
        assert Withstand(clients=clients).parameters.degree > 2 * degree


@pytest.mark.parametrize(("share", "threshold"), [(0.0, 51), (0.1, 56), (1 / 3, 67)])
def test_thresholds_against_a_server_that_lies(share: float, threshold: int) -> None:
    """t > n/2 against the server alone, t ≥ ⌊2n/3⌋ + 1 against it and a third of the clients; all mask with all."""
    found = Withstand(clients=100, corrupt=share, dropouts=0.1, malicious=True).parameters
    assert found == (99, threshold)
    assert 2 * threshold > 100 + math.floor(share * 100)


def test_very_many_are_refused_only_where_the_server_may_lie() -> None:
    assert Withstand(clients=MOST_WITH_ALL, malicious=True).parameters.degree == MOST_WITH_ALL - 1
    assert Withstand(clients=1 << 20).parameters.degree < 100


@given(st.integers(3, 400), st.floats(0, 0.5), st.floats(0, 0.5), st.booleans())
def test_what_is_found_is_between_what_is_secure_and_what_is_reached(
    clients: int, corrupt: float, dropouts: float, malicious: bool
) -> None:
    try:
        wanted = Withstand(clients=clients, corrupt=corrupt, dropouts=dropouts, malicious=malicious)
    except NoGuarantee:
        assert corrupt + dropouts * (2 if malicious else 1) > 0.9 or clients - 2 < corrupt * clients + 1 or clients < 20
        return
    degree, threshold = wanted.parameters
    assert 2 <= threshold <= degree + 1 <= clients
    if degree == clients - 1:
        assert wanted.corrupted < threshold <= clients - wanted.lost
    else:
        assert degree % 2 == 0
        assert not malicious


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"clients": 2}, "clients must be a whole number from 3"),
        ({"clients": 100, "corrupt": 1.0}, "corrupt must be a number of at least 0 and below 1"),
        ({"clients": 100, "corrupt": 0.6, "dropouts": 0.5}, "61 clients to put a secret together, and 50 are left"),
        ({"clients": 100, "corrupt": 1 / 3, "dropouts": 0.4, "malicious": True}, "2 · dropouts must be below 1"),
        ({"clients": 5, "corrupt": 0.9}, "shows the one that is left"),
        ({"clients": 20_000, "malicious": True}, r"all 20000 clients would mask with all others, .* 45 GB of shares"),
    ],
)
def test_what_nothing_withstands_is_refused_when_written(wrong: dict[str, float], told: str) -> None:
    with pytest.raises((NoGuarantee, ConfigurationError), match=told):
        Withstand(**wrong)  # type: ignore[arg-type]


@given(st.integers(3, 60), st.integers(1, 29), st.binary(min_size=32, max_size=32))
def test_neighbours_are_mutual_and_as_many_as_the_degree(clients: int, half: int, seed: bytes) -> None:
    degree = min(2 * half, clients - 1)
    if degree < clients - 1 and degree % 2:
        degree -= 1
    graph = ring(seed, clients, degree)
    near = [set(graph.neighbours(i).tolist()) for i in range(clients)]
    for i, own in enumerate(near):
        assert len(own) == degree
        assert i not in own
        assert all(i in near[j] for j in own)
        assert graph.neighbours(i).tolist() == sorted(own)


def test_another_seed_deals_another_graph() -> None:
    one, other = (ring(bytes([s]) * 32, 100, 6) for s in (1, 2))
    assert any(one.neighbours(i).tolist() != other.neighbours(i).tolist() for i in range(100))


def test_every_client_is_as_likely_a_neighbour_as_any_other() -> None:
    counts = np.zeros(12)
    for seed in range(400):
        counts[ring(seed.to_bytes(32, "little"), 12, 4).neighbours(0)] += 1
    assert counts[0] == 0
    assert np.abs(counts[1:] - 400 * 4 / 11).max() < 6 * math.sqrt(400 * 4 / 11)

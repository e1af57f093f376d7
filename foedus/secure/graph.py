"""Who masks with whom: random graphs of a degree found from what is to be withstood (Bell et al. 2020, "Secure
single-server aggregation with (poly)logarithmic overhead", the protocol against servers that only look).

A client shares masks and secrets with k others instead of all n − 1. Clients are put on a ring in random order, and
each is joined to the k/2 before and behind it. With a share γ of clients that collude with the server and a share δ
that drops out, three things must go right, and :func:`parameters` finds the smallest k, and a threshold t, with which
they do:

* those who are honest and stay are connected: fails with probability at most n (γ + δ)^(k/2);
* no honest client has t neighbours that collude: n · P[Hypergeometric(n − 1, γn, k) ≥ t], together with the line above
  at most 2^−security;
* every client has t neighbours that stay: n · P[Hypergeometric(n − 1, (1 − δ)n, k) < t] ≤ 2^−correctness.

Where no k below n − 1 will do, all mask with all (Bonawitz et al. 2017, "Practical secure aggregation for
privacy-preserving machine learning"). The same where the server itself may lie: one that deals the graph could give a
client neighbours of its choice; then 2t > n + γn, so that it cannot have one secret of a client from some and the other
from others. γn is a number of clients, and stays where fewer than n are asked: a server may ask just those. What all
with all costs grows with n², and is refused beyond :data:`MOST_WITH_ALL` clients.

Not here: the protocol (``foedus.protocol.secagg``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.keystream import keystream
from foedus.errors import ConfigurationError, NoGuarantee

Ints = NDArray[np.int64]
MOST_WITH_ALL = 1 << 14  # clients, where the server may lie: beyond it, there is hardly a server with the memory
HELD = 113  # bytes that a server holds for every two of them: two shares, sealed, one opened, and whether it has come


class Parameters(NamedTuple):
    """What follows from what is to be withstood: neighbours of a client, and how many of those who hold its shares put
    its secrets together."""

    degree: int
    threshold: int


@dataclass(frozen=True, kw_only=True)
class Withstand:
    """What a masked sum is to withstand. Degree and threshold follow from it; nobody writes them by hand.

    Attributes:
        clients: at most so many are asked in a round.
        corrupt: the share of them that may show the server all they know. What is withstood is a number of clients,
            ``corrupted``: the share of ``clients``, rounded down, and 1 at least unless the share is 0. It stays that
            number in a round in which fewer are asked (``among``), since nothing keeps a server from asking just them.
        dropouts: the share that may be lost on the way, at whatever stage.
        security: the chance that secrets of an honest client come out is at most 2^−security.
        correctness: the chance that a round fails although no more are lost is at most 2^−correctness.
        malicious: the server may lie, and not only look: clients then sign keys and the set of survivors, by identities
            that the server did not issue, and all mask with all. That is n − 1 masks and signatures for a client, and
            n² sealed shares at the server: 0.1 GB for 1000 clients, 11 GB for 10,000.

    Raises:
        NoGuarantee: nothing withstands this.
        ConfigurationError: the server may lie, and there are more than 16,384 clients.

    Example:
        >>> Withstand(clients=1000, corrupt=0.1, dropouts=0.1).parameters
        Parameters(degree=46, threshold=26)
    """

    clients: int
    corrupt: float = 0.1
    dropouts: float = 0.1
    security: float = 40.0
    correctness: float = 20.0
    malicious: bool = False

    def __post_init__(self) -> None:
        check_whole("clients", self.clients, least=3, most=1 << 20)
        for name in ("corrupt", "dropouts"):
            check_number(name, getattr(self, name), below=1)
        for name in ("security", "correctness"):
            check_number(name, getattr(self, name), above=True, below=256)
        _check_honest(self.corrupted, self.clients)
        _ = self.parameters

    @property
    def corrupted(self) -> int:
        """How many clients may collude with the server, however many are asked.

        Example:
            >>> [Withstand(clients=n, corrupt=0.1).corrupted for n in (9, 10, 29, 30)]
            [1, 1, 2, 3]
        """
        return max(math.floor(self.corrupt * self.clients + 1e-9), int(self.corrupt > 0))

    @property
    def share(self) -> float:
        """The share of clients that ``corrupted`` are, or ``corrupt`` where that is more."""
        return max(self.corrupt, self.corrupted / self.clients)

    @property
    def lost(self) -> int:
        """How many clients may be lost."""
        return math.floor(self.dropouts * self.clients + 1e-9)

    @property
    def parameters(self) -> Parameters:
        """Degree and threshold."""
        return parameters(self)

    def among(self, clients: int) -> Withstand:
        """What a round is to withstand in which only so many are asked: **as many** of them may collude, not as large
        a share. A server that asks fewer may ask all that collude with it.

        Raises:
            NoGuarantee: too few are asked.

        Example:
            >>> promised = Withstand(clients=30, corrupt=0.2, dropouts=0.2, malicious=True)
            >>> promised.corrupted, promised.among(20).corrupted, promised.among(20).parameters
            (6, 6, Parameters(degree=19, threshold=14))
        """
        if clients == self.clients:
            return self
        try:
            _check_honest(self.corrupted, clients)
            return replace(self, clients=clients, corrupt=self.corrupted / clients)
        except NoGuarantee as error:
            raise NoGuarantee(
                f"{clients} clients are asked, and all {self.corrupted} that may collude by {self.label} may be among "
                f"them: {error}"
            ) from None

    @property
    def label(self) -> str:
        told = [f"clients={self.clients}", f"corrupt={self.corrupt}", f"dropouts={self.dropouts}"]
        told += [f"{n}={v}" for n, v in (("security", self.security), ("correctness", self.correctness))
                 if v != getattr(Withstand, n)]  # fmt: skip
        return f"Withstand({', '.join(told)}{', malicious=True' * self.malicious})"


def _check_honest(corrupted: int, clients: int) -> None:
    if corrupted > clients - 2:
        raise NoGuarantee(
            f"with {corrupted} of {clients} clients corrupt, a sum shows the one that is left. Withstand fewer, or ask "
            "more clients"
        )


@lru_cache(maxsize=64)
def parameters(wanted: Withstand) -> Parameters:
    """The smallest degree with which all that is wanted is withstood, and a threshold between the least that is secure
    and the most that is reached.

    Raises:
        NoGuarantee: not even all with all withstand it.
        ConfigurationError: they would, and are too many.
    """
    if not wanted.malicious:
        first = 2 * math.ceil(_ring(wanted))
        for degree in range(max(first, 2), wanted.clients - 1, 2):
            low, high = _thresholds(wanted, degree)
            if low <= high:
                return Parameters(degree, (low + high) // 2)
    low = (wanted.clients + wanted.corrupted) // 2 + 1 if wanted.malicious else max(wanted.corrupted + 1, 2)
    high = wanted.clients - wanted.lost
    if low > high:
        raise NoGuarantee(
            f"{wanted.label}: it would take {low} clients to put a secret together, and {high} are left when "
            f"{wanted.lost} are lost. "
            + ("Against a server that lies, corrupt + 2 · dropouts must be below 1" if wanted.malicious else "")
        )
    _check_affordable(wanted)
    return Parameters(wanted.clients - 1, low if wanted.malicious else (low + high) // 2)


def _check_affordable(wanted: Withstand) -> None:
    """Refuse that very many mask with all because the server may lie."""
    if not wanted.malicious or wanted.clients <= MOST_WITH_ALL:
        return
    held = HELD * wanted.clients**2 / 1e9
    raise ConfigurationError(
        f"{wanted.label}: against a server that lies, all {wanted.clients} clients would mask with all others, which "
        f"takes {wanted.clients - 1} masks of each, and {held:,.0f} GB of shares at the server. Ask at most "
        f"{MOST_WITH_ALL} clients in a round; or write malicious=False, with which each has a few dozen neighbours"
    )


def _ring(wanted: Withstand) -> float:
    """k / 2, from which on n (γ + δ)^(k/2) ≤ 2^−security."""
    share = wanted.share + wanted.dropouts
    if share >= 1:
        return wanted.clients
    return (wanted.security + math.log2(wanted.clients)) / -math.log2(share) if share else 1.0


def _thresholds(wanted: Withstand, degree: int) -> tuple[int, int]:
    """The least threshold that is secure, and the greatest that is reached."""
    count, others = wanted.clients, wanted.clients - 1
    apart = count * (wanted.share + wanted.dropouts) ** (degree / 2)
    allowed = (2.0**-wanted.security - apart) / count
    if allowed <= 0:
        return degree + 1, degree
    corrupt = _masses(others, wanted.corrupted, degree)
    above = np.cumsum(corrupt[::-1])[::-1]  # P[at least x], summed from the small ones
    low = int(np.argmax(np.append(above, 0.0) <= allowed))
    staying = _masses(others, others - wanted.lost, degree)
    below = np.concatenate([[0.0], np.cumsum(staying)])  # P[fewer than x]
    high = int(np.flatnonzero(below[: degree + 1] <= 2.0**-wanted.correctness / count)[-1])
    return max(low, 2), high


def _masses(population: int, marked: int, drawn: int) -> NDArray[np.float64]:
    """P[x of those drawn are marked], x = 0 … drawn: the hypergeometric distribution."""
    found = np.zeros(drawn + 1)
    whole = _choose(population, drawn)
    for x in range(max(0, drawn - (population - marked)), min(marked, drawn) + 1):
        found[x] = math.exp(_choose(marked, x) + _choose(population - marked, drawn - x) - whole)
    return found


def _choose(n: int, k: int) -> float:
    """log of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# --- the graph ----------------------------------------------------------------------------------------------


class Ring(NamedTuple):
    """A dealt graph: ``order`` int64 [place], who stands where; ``place`` int64 [client], the inverse; the degree."""

    order: Ints
    place: Ints
    degree: int

    def neighbours(self, client: int) -> Ints:
        """A client's neighbours, rising, int64 [degree].

        Example:
            >>> ring(bytes(32), 5, 4).neighbours(1).tolist()
            [0, 2, 3, 4]
        """
        count = len(self.order)
        if self.degree >= count - 1:
            return np.delete(np.arange(count), client)
        steps = np.arange(1, self.degree // 2 + 1)
        around = (self.place[client] + np.concatenate([-steps, steps])) % count
        return np.sort(self.order[around])


@lru_cache(maxsize=16)
def ring(seed: bytes, clients: int, degree: int) -> Ring:
    """The graph that a seed deals: the same for all who know it.

    Args:
        seed: 32 bytes.
        clients: how many.
        degree: even, or ``clients − 1`` for all with all.
    """
    order = np.arange(clients)
    if degree < clients - 1:
        order = np.argsort(np.frombuffer(keystream(seed, 8 * clients), "<u8"), kind="stable")
    return Ring(order, np.argsort(order), degree)

"""What secure aggregation costs in bytes: the published formula, and what our messages take, item by item.

Bonawitz et al. 2017 (section 7.1 of eprint 2017/281) count, for a client, sent and received: 2n public keys, 5n − 4
shares, n bits of who survived, and m masked numbers. Ours adds what makes shares and keys hard to tamper with: a tag
for each sealed share, a commitment to the seed, signatures where the server may lie.

Not here: the messages (``foedus.protocol.secagg``), which are held to these figures by a test.
"""

from __future__ import annotations

from typing import NamedTuple

from foedus.secure.graph import Withstand
from foedus.secure.planes import packed_bytes
from foedus.secure.primitives import KEY, SIGNATURE, TAG

TERMS = 16 + 8 + 4 + 32 + 32 + 6 * 4 + 4  # session, round, attempt, model, graph, six numbers, version and flags
CHANNEL = 8  # for a channel beside the first: two numbers


class Traffic(NamedTuple):
    """Bytes that a client sends and receives in one round without dropouts, by what they are for."""

    terms: int
    keys: int
    shares: int
    sets: int
    numbers: int
    tags: int
    commitments: int
    identities: int
    signatures: int

    @property
    def total(self) -> int:
        return sum(self)


def published(clients: int, entries: int, width: int) -> float:
    """Bytes of a client by the formula, sent and received, where all mask with all.

    Example:
        >>> plain = 2 * 2**20
        >>> round(published(2**10, 2**20, 26) / plain, 3), round(published(2**14, 2**24, 30) / (16 * plain), 3)
        (1.734, 1.984)
    """
    return (2 * clients * 256 + (5 * clients - 4) * 256 + clients + entries * width) / 8


def traffic(degree: int, entries: int, width: int, *, malicious: bool = False) -> Traffic:
    """Bytes of a client, sent and received, with so many neighbours.

    Example:
        >>> traffic(1023, 2**20, 26).total / published(2**10, 2**20, 26) < 1.01
        True
    """
    up, down = _parts(degree, malicious=malicious)
    both = [a + b for a, b in zip(up, down, strict=True)]
    return Traffic(*both)._replace(numbers=packed_bytes(entries, width))


def overhead(withstand: Withstand) -> tuple[int, int]:
    """Bytes sent and received beside the masked numbers, without dropouts."""
    up, down = _parts(withstand.parameters.degree, malicious=withstand.malicious)
    return up.total, down.total


def _parts(degree: int, *, malicious: bool) -> tuple[Traffic, Traffic]:
    """Sent, and received."""
    signs, bits = int(malicious), -(-(degree + 1) // 8)
    up = Traffic(
        terms=0, keys=2 * KEY, shares=2 * KEY * degree + KEY * (degree + 1), sets=bits, numbers=0, tags=TAG * degree,
        commitments=KEY, identities=signs * KEY, signatures=2 * signs * SIGNATURE,
    )  # fmt: skip
    down = Traffic(
        terms=TERMS, keys=2 * KEY * degree, shares=2 * KEY * degree, sets=bits * (3 + signs) + 4, numbers=0,
        tags=TAG * degree, commitments=0, identities=signs * KEY * degree,
        signatures=signs * (SIGNATURE * degree + SIGNATURE * (degree + 1)),
    )  # fmt: skip
    return up, down

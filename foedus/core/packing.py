"""How the local steps of many clients are computed together, although the clients differ in size.

A cohort that is computed at once needs batches of one width, and clients have smaller last batches, and more
or fewer of them. Two freedoms keep the padding small. Which clients go together: they are sorted by size and
cut into blocks. And *when* a client takes its next step: nothing ties it to the others, so that in every call
the largest group of clients whose next batches are about equally wide steps forward, while the rest wait
until their group is the largest. A call is never padded by more than the share allowed, hence neither is the
whole.

Where padding would change the result (BatchNorm), the share is 0, and only equally wide batches go together.

Everything here depends on the cohort alone, never on how many processors there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jaxtyping import Int

PADDING = 0.1  # of the examples that are computed, the share that may be padding

Ints = NDArray[np.int64]


class Call(NamedTuple):
    """One step of several clients at once.

    Attributes:
        members: int64 [k], which clients of the block, ascending.
        steps: int64 [k], each one's step, as a row of the block's plan.
        width: rows that are computed for each; their batches have at most as many.
    """

    members: Ints
    steps: Ints
    width: int

    @property
    def where(self) -> slice | Ints:
        """The members as an index; a slice where they follow each other, so that nothing is copied."""
        first, end = int(self.members[0]), int(self.members[-1]) + 1
        return slice(first, end) if end - first == len(self.members) else self.members


def blocks(work: NDArray[np.integer], count: int, *, most: int) -> list[Ints]:
    """A cohort cut into blocks of clients of similar size and of about equal work, the largest clients first.

    Args:
        work: int [C], how much there is to compute for each client, e.g. its number of local steps.
        count: how many blocks, about; more if they would be too large.
        most: clients in a block, at most.

    Returns:
        Slots of the cohort, one array per block.

    Example:
        >>> [b.tolist() for b in blocks(np.array([5, 60, 7, 61, 60]), 2, most=3)]
        [[3, 1], [4, 2, 0]]
    """
    order = np.argsort(-np.asarray(work, np.int64), kind="stable")
    sorted_work = np.asarray(work, np.float64)[order]
    middle = np.cumsum(sorted_work) - sorted_work / 2
    number = np.floor(middle * count / max(sorted_work.sum(), 1)).astype(np.int64)
    parts = np.split(order, np.flatnonzero(np.diff(number)) + 1)
    return [b for part in parts for b in np.array_split(part, max(1, -(-len(part) // most))) if len(b)]


def calls(
    count: Int[NDArray[np.integer], " step"],
    steps: Int[NDArray[np.integer], " client"],
    *,
    padding: float = PADDING,
) -> list[Call]:
    """The steps of a block of clients, arranged into calls.

    Args:
        count: int [T], real examples of every step, client after client.
        steps: int [K], number of steps of each client.
        padding: the greatest share of padding in what is computed, in [0, 1); 0 allows none.

    Returns:
        Calls in which every client takes each of its steps once, in its own order.

    Example:
        >>> [(c.members.tolist(), c.width) for c in calls(np.array([4, 1, 4, 4]), np.array([2, 2]))]
        [([0, 1], 4), ([1], 4), ([0], 1)]
    """
    ends = np.cumsum(np.asarray(steps, np.int64))
    at = (ends - steps).astype(np.int64)
    found: list[Call] = []
    while len(active := np.flatnonzero(at < ends)):
        members, width = _group(active, count[at[active]], ends[active] - at[active], padding)
        found.append(Call(members, at[members], width))
        at[members] += 1
    return found


def _group(active: Ints, widths: NDArray[Any], left: Ints, padding: float) -> tuple[Ints, int]:
    """The clients that step next: the most there are; among equally many, those with most steps left.

    For each width that occurs, clients join from the widest down while padding stays within its share.
    """
    if widths.min() == widths.max():
        return active, int(widths[0])
    order = np.argsort(-widths, kind="stable")
    down = widths[order]
    best: tuple[int, int, int, int] | None = None
    for begin in np.flatnonzero(np.diff(down, prepend=-1)).tolist():
        width = int(down[begin])
        wasted = np.cumsum(width - down[begin:])
        within = wasted <= padding * width * np.arange(1, len(wasted) + 1)
        size = int(np.flatnonzero(within)[-1]) + 1
        candidate = (size, int(left[order[begin : begin + size]].max()), begin, width)
        best = candidate if best is None or candidate[:2] > best[:2] else best
    assert best is not None
    size, _, begin, width = best
    return np.sort(active[order[begin : begin + size]]), width

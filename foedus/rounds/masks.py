"""Which channels of an algorithm are masked, and what may not travel beside them.

Not here: masked sums in a simulation (``sim/masks.py``), between machines (``net/masking.py``, ``net/conferring.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from foedus.core.aggregate import Aggregator, Masking
from foedus.core.compose import Algorithm
from foedus.core.values import Update
from foedus.errors import IncompatibleStages
from foedus.protocol.secagg.messages import Promise
from foedus.rounds.parcel import Terms
from foedus.rounds.work import BUFFERS, UPDATE


def channels(algorithm: Algorithm, *, buffers: bool) -> Iterator[tuple[str, Aggregator]]:
    """What travels, and by which rule."""
    yield UPDATE, algorithm.aggregator
    if buffers:
        yield BUFFERS, algorithm.buffers
    yield from sorted(({} if algorithm.method is None else algorithm.method.sides).items())


def maskings(algorithm: Algorithm, *, buffers: bool) -> dict[str, Masking]:
    """The channels that are masked."""
    return {c: rule.masking for c, rule in channels(algorithm, buffers=buffers) if rule.masking is not None}


def check_buffers(algorithm: Algorithm, found: Mapping[str, Masking], *, buffers: bool) -> None:
    """Refuse buffers that are averaged in the plain beside a masked update.

    Raises:
        IncompatibleStages: says what to write instead.
    """
    if found and buffers and BUFFERS not in found:
        raise IncompatibleStages(
            f"the model's buffers (BatchNorm's statistics) are averaged by {algorithm.buffers.label}, which the server "
            f"sees of every client, while {algorithm.aggregator.label} hides the update. Write "
            "Task(..., average_buffers=False), or algorithm.with_(buffers=foedus.masked(...))"
        )


def masked_update(algorithm: Algorithm, *, buffers: bool) -> Masking | None:
    """The masking of the update where it is all that travels, as it must be between machines; ``None``: no masks.

    Args:
        algorithm: the run's.
        buffers: whether buffers are averaged.

    Raises:
        IncompatibleStages: something else would travel, or updates come at their own time.
    """
    if algorithm.aggregator.sealed is not None:
        raise IncompatibleStages(
            f"{algorithm.aggregator.label} is decrypted by those who share its key, and a server between machines does "
            "not ask them to yet. Take masked(...), which needs no common key; encrypted sums run in fd.simulate"
        )
    found = maskings(algorithm, buffers=buffers)
    if not found:
        return None
    check_buffers(algorithm, found, buffers=buffers)
    others = [name for name, _ in channels(algorithm, buffers=buffers) if name != UPDATE]
    if others or UPDATE not in found:
        raise IncompatibleStages(
            f"between machines {algorithm.aggregator.label} masks the update, and nothing else may travel; this "
            f"algorithm sends {', '.join(map(repr, others)) or 'it in the plain'}, too. Take a method without channels "
            "of its own (fedavg, FedProx, server optimisers), and Task(..., average_buffers=False)"
        )
    if algorithm.timing is not None:
        raise IncompatibleStages(
            f"between machines a masked sum is made by those who take part in one round together, and "
            f"{algorithm.timing.label} lets them come and go. Leave out timing="
        )
    return found[UPDATE]


def promise_of(terms: Terms) -> Promise:
    """What a client is promised of a round, from the algorithm itself: both sides work it out for themselves.

    Args:
        terms: of the round, of an algorithm whose update is masked.
    """
    rule = terms.job.algorithm.aggregator
    assert rule.masking is not None
    layout = terms.layout(UPDATE, 0)
    context = terms.context(0, UPDATE, layout.size)
    nothing = rule.encode(Update(np.zeros(layout.size, layout.dtype), 1.0), context)
    entries = len(rule.admit(nothing, context)["sum"])
    return Promise(rule.masking.withstand, rule.masking.least, entries, rule.masking.width)

"""What is not told beside an update that is to hide its client: numbers of examples, weights, steps, losses, reports.

An update that is encrypted, or that has noise of its client's own, travels without them: they come from the same data,
and nothing covers them. Every such update counts the same, on both sides and in a simulation. ``dp_sgd`` hides single
examples and takes their number to be public, but no loss and no report.

A simulation writes down what it knows for whoever runs it; a server has nothing to write down.

Not here: what parcels look like (``parcel.py``).
"""

from __future__ import annotations

from foedus.core.client import LocalTraining
from foedus.core.compose import Algorithm
from foedus.privacy.claims import noised_by_clients
from foedus.rounds.work import Outcome


def noised(algorithm: Algorithm) -> bool:
    """Whether clients add noise to what they send.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.compose import fedavg
        >>> noised(fedavg(local_sgd(0.1)))
        False
    """
    sides = {} if algorithm.method is None else algorithm.method.sides
    return any(noised_by_clients(rule) for rule in (algorithm.aggregator, algorithm.buffers, *sides.values()))


def sealed(algorithm: Algorithm) -> bool:
    """Whether the update is encrypted."""
    return algorithm.aggregator.sealed is not None


def trained_in_private(algorithm: Algorithm) -> bool:
    """Whether noise in their training hides clients' single examples."""
    return isinstance(algorithm.client, LocalTraining) and algorithm.client.private


def stands_for(algorithm: Algorithm, outcome: Outcome) -> int:
    """What the updates that were let in weigh together: as many as their examples, or each 1 where all count the same.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.compose import fedavg
        >>> stands_for(fedavg(local_sgd(0.1)), Outcome(clients=[0, 1], examples=[3, 4]))
        7
    """
    return len(set(outcome.clients) - outcome.out) if noised(algorithm) else outcome.weight


__all__ = ["noised", "sealed", "stands_for", "trained_in_private"]

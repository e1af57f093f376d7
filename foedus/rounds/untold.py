"""What is not told beside an update that is to hide its client: numbers of examples, weights, steps, losses, reports;
and what such an update is worth.

An update that is encrypted, or that has noise of its client's own, travels without them: they come from the same data,
and nothing covers them. Every such update counts the same, on both sides and in a simulation. ``dp_sgd`` hides single
examples and takes their number to be public, but no loss and no report.

A simulation writes down what it knows for whoever runs it; a server has nothing to write down.

Not here: what parcels look like (``parcel.py``), what has left (``net/owner/releases.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from foedus.core.client import LocalTraining
from foedus.core.compose import Algorithm
from foedus.core.select import everybody
from foedus.errors import NoGuarantee
from foedus.privacy.accounting import rdp
from foedus.privacy.claims import noised_by_clients, round_event
from foedus.privacy.events import Event, LocalGaussian, as_json, of_json
from foedus.rounds.work import Outcome


def noised(algorithm: Algorithm) -> bool:
    """Whether clients add noise to what they send.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.compose import fedavg
        >>> noised(fedavg(local_sgd(0.1)))
        False
    """
    rules = (algorithm.aggregator, algorithm.buffers, *algorithm.sides.values())
    return any(map(noised_by_clients, rules))


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


def release_of(algorithm: Algorithm, *, buffers: bool) -> tuple[str, str]:
    """The event that one update of a client is, as JSON, and ``""``; or ``""``, and why it hides no client.

    Args:
        algorithm: what clients do.
        buffers: whether buffers are averaged.

    Example:
        >>> from foedus.core.aggregate import mean
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.compose import fedavg
        >>> from foedus.core.stage import chain
        >>> from foedus.privacy.mechanisms import local
        >>> rule = chain(local(clip=1.0, noise_multiplier=4.0), mean())
        >>> release_of(fedavg(local_sgd(0.1), aggregator=rule), buffers=False)
        ('{"event": "LocalGaussian", "noise_multiplier": 4.0}', '')
    """
    if not noised(algorithm):
        return "", f"{algorithm.label} has clients add no noise to what they send"
    try:  # how often a client comes is counted, release by release, so that no pace matters
        event = round_event(replace(algorithm, timing=None), everybody(), buffers=buffers)
    except NoGuarantee as error:
        return "", str(error)
    return json.dumps(as_json(event), sort_keys=True), ""


def too_much(kind: str, why: str, before: Mapping[str, int], budget: tuple[float, float]) -> str:
    """Why an update may not leave, if so much may be learned of its client and no more; ``""`` if it may.

    Args:
        kind, why: see :func:`release_of`.
        before: how many of every kind have left.
        budget: ε and δ.

    Example:
        >>> kind = '{"event": "LocalGaussian", "noise_multiplier": 4.0}'
        >>> too_much(kind, "", {kind: 1}, (8.0, 1e-5))
        ''
        >>> too_much(kind, "", {kind: 5}, (4.0, 1e-5))
        'of ε = 4 at δ = 1e-05 for all that is sent, 5.378 is spent, and one update more would make it 5.979'
    """
    event = of_json(json.loads(kind)) if kind else None
    if not isinstance(event, LocalGaussian):
        told = why or "its noise protects only together with that of others"
        return f"only updates that this client's own noise hides may leave, and this is none: {told}"
    (epsilon, delta), counts = budget, Counter[Event]()
    for text, count in before.items():
        if text and isinstance(each := of_json(json.loads(text)), LocalGaussian):
            counts[each] += count
    spent = rdp(list(counts.items()), delta)
    counts[event] += 1
    would = rdp(list(counts.items()), delta)
    if would <= epsilon:
        return ""
    return (
        f"of ε = {epsilon:g} at δ = {delta:g} for all that is sent, {spent:.4g} is spent, and one update more would "
        f"make it {would:.4g}"
    )


__all__ = ["noised", "release_of", "sealed", "stands_for", "too_much", "trained_in_private"]

"""Which channels of an algorithm are masked or encrypted, and what may not travel beside them.

All that is masked in a round is added up in one conversation, under the same masks: the server learns every channel's
sum over the same clients, or none. Every channel has numbers and bits of its own.

Not here: masked sums in a simulation (``sim/masks.py``), between machines (``net/masking.py``, ``net/conferring.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from foedus.core.aggregate import Masking, Sealed
from foedus.core.compose import Algorithm
from foedus.core.values import Update
from foedus.errors import IncompatibleStages
from foedus.protocol.secagg.messages import Channel, Promise
from foedus.rounds.parcel import Terms
from foedus.rounds.work import BUFFERS, UPDATE
from foedus.secure.graph import Withstand
from foedus.tree import Layout


def maskings(algorithm: Algorithm, *, buffers: bool) -> dict[str, Masking]:
    """The channels that are masked."""
    return {c: rule.masking for c, rule in algorithm.channels(buffers=buffers) if rule.masking is not None}


class Together(NamedTuple):
    """What the masked channels of a round have in common: what is withstood, and the fewest clients in a sum."""

    withstand: Withstand
    least: int


def together(found: Mapping[str, Masking]) -> Together:
    """What holds for channels that are masked in one conversation: the highest of their floors.

    Args:
        found: masked channels, at least one.

    Raises:
        IncompatibleStages: they are to withstand different things.
    """
    (first, masking), *others = found.items()
    for name, other in others:
        if other.withstand != masking.withstand:
            raise IncompatibleStages(
                f"{first!r} is masked for {masking.withstand.label}, and {name!r} for {other.withstand.label}: all "
                "that is masked in a round goes into one conversation among the same clients. Give all channels the "
                "same Withstand; bits, bound and most may differ"
            )
    return Together(masking.withstand, max(each.least for each in found.values()))


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


def masked_together(algorithm: Algorithm, layout: Layout, *, buffers: bool) -> Together | None:
    """What holds for all that travels in a round between machines, where it is masked; ``None``: no masks.

    Args:
        algorithm: the run's.
        layout: of the model's parameters.
        buffers: whether buffers are averaged.

    Raises:
        IncompatibleStages: something would travel in the plain, or nobody knows how long it is before training, or
            updates come at their own time.
    """
    found = maskings(algorithm, buffers=buffers)
    if not found:
        return None
    check_buffers(algorithm, found, buffers=buffers)
    plain = [name for name, rule in algorithm.channels(buffers=buffers) if rule.masking is None]
    if plain:
        raise IncompatibleStages(
            f"{', '.join(map(repr, found))} would be masked, and {', '.join(map(repr, plain))} travel beside it in the "
            "plain: between machines all that travels in a round is masked, or nothing. Write "
            "algorithm.with_(aggregator=..., sides={...}) with masked(...) for each, or take a method that sends "
            "updates only (fedavg, FedProx, server optimisers)"
        )
    _check_timing(algorithm)
    lengths(algorithm, layout)
    return together(found)


def sealed_update(algorithm: Algorithm, *, buffers: bool) -> Sealed | None:
    """How the update is encrypted, where it is all that travels, as it must be between machines; ``None``: it is not.

    Args:
        algorithm, buffers: as for :func:`masked_together`.

    Raises:
        IncompatibleStages: something else would travel, or updates come at their own time.
    """
    rules = dict(algorithm.channels(buffers=buffers))
    if all(rule.sealed is None for rule in rules.values()):
        return None
    others = [name for name in rules if name != UPDATE]
    if others or algorithm.aggregator.sealed is None:
        raise IncompatibleStages(
            f"between machines {algorithm.aggregator.label} hides the update, and nothing else may travel; this "
            f"algorithm sends {', '.join(map(repr, others)) or 'it in the plain'}, too. Take a method without channels "
            "of its own (fedavg, FedProx, server optimisers) and Task(..., average_buffers=False); or masked(...) for "
            "every channel, which needs no common key"
        )
    _check_timing(algorithm)
    return algorithm.aggregator.sealed


def _check_timing(algorithm: Algorithm) -> None:
    if algorithm.timing is not None:
        raise IncompatibleStages(
            f"between machines a hidden sum is made by all who take part in a round together, and "
            f"{algorithm.timing.label} parts them: one server would open the sums of all edges, and learn more than it "
            "does from a single one. Leave out timing=: with one round each, edges change no bit of the result"
        )


def lengths(algorithm: Algorithm, layout: Layout) -> Mapping[str, int]:
    """How long the vectors in a method's own channels are: agreed on before anybody has trained.

    Raises:
        IncompatibleStages: the method does not say.
    """
    method = algorithm.method
    if method is None:
        return {}
    if method.silent:
        raise IncompatibleStages(
            f"with {method.label} clients send nothing at times, and a masked sum does not tell how many were there "
            "without being in it. Use federated averaging, or a method whose clients always send"
        )
    told = method.lengths(layout)
    if unknown := sorted(method.sides.keys() - told.keys()):
        names = ", ".join(map(repr, unknown))
        raise IncompatibleStages(
            f"{method.label} sends {names} beside the update, and does not say how many numbers that is, which clients "
            "agree on before they mask it. Write Method(..., lengths=lambda layout: "
            f"{{{unknown[0]!r}: layout.size}}); a method whose clients leave channels out cannot be masked at all"
        )
    return told


def promise_of(terms: Terms) -> Promise:
    """What a client is promised of a round, from the algorithm itself: both sides work it out for themselves.

    Args:
        terms: of the round, of an algorithm all of whose channels are masked.
    """
    job = terms.job
    buffers = job.task.average_buffers and terms.layout(BUFFERS, 0).size > 0
    common = together(maskings(job.algorithm, buffers=buffers))
    known = lengths(job.algorithm, terms.layouts[0])
    sizes = {name: known.get(name, terms.layout(name, 0).size) for name, _ in job.algorithm.channels(buffers=buffers)}
    return Promise(*common, tuple(_channel(terms, name, size) for name, size in sizes.items()))


def _channel(terms: Terms, name: str, size: int) -> Channel:
    """The numbers that a vector of a channel becomes."""
    rule = terms.job.algorithm.aggregator_of(name)
    assert rule.masking is not None
    context = terms.context(0, name, size)
    nothing = rule.encode(Update(np.zeros(size, terms.layout(name, size).dtype), 1.0), context)
    return Channel(name, len(rule.admit(nothing, context)["sum"]), rule.masking.width)

"""The small values that pass between the parts of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.tree import Layout, Vector

Message = dict[str, NDArray[Any]]  # what travels and is merged
State = dict[str, NDArray[Any]]  # what the server, or a client, keeps between rounds

SERVER = -1  # the client of a context in which the server itself computes
NOTHING: Mapping[str, NDArray[Any]] = {}  # shared, never written to (a read-only view of it could not be pickled)


class Update(NamedTuple):
    """What one client learned: ``vector`` = its weights after training − the weights it received, [parameter].

    On its way through the stages of a chain the vector may become shorter, or whole numbers:

    Attributes:
        vector: [parameter], or what a stage made of it.
        weight: how much it counts in a weighted mean; by default a client's number of examples.
        beside: small arrays that a stage needs to undo what it did to this one update (scales, positions).
    """

    vector: Vector | NDArray[Any]
    weight: float
    beside: Mapping[str, NDArray[Any]] = NOTHING


class Context(NamedTuple):
    """Whose update, and when: all that a stage may base its randomness on.

    Attributes:
        seed: the run's; every party knows it. Nothing that must stay secret is drawn from it.
        round: counted from 1.
        client: position in the population; ``SERVER`` where the server decodes a sum.
        layout: where the model's arrays lie in the vector, for stages that treat layers differently.
        size: the length of the vector that ``encode`` was given, which whoever undoes it must know.
        channel: which vector it is, where several travel: "update", "buffers", or a method's own.
        kept: what this client kept since it last took part (see ``Aggregator.remember``).
        told: what the aggregator tells clients in this round (see ``Aggregator.tell``).
        secret: where noise is drawn from that has to stay secret; ``None``: from the operating system. The simulator
            gives one that is counted, so that runs repeat; whoever knows its seed knows that noise.
        refused: where the server decodes: how many updates of the round were refused before they were merged. A
            rule that was told a number of attackers counts these among them.
    """

    seed: int
    round: int
    client: int
    layout: Layout | None = None
    size: int = 0
    channel: str = "update"
    kept: Mapping[str, NDArray[Any]] = NOTHING
    refused: int = 0
    told: Mapping[str, NDArray[Any]] = NOTHING
    secret: Secret | None = None


# ``secret(context, purpose, about, count) -> words`` uint64 [count], uniformly random. ``about`` is the array that the
# noise is to protect: a source that repeats itself for the same purpose must give other words for another array.
Secret = Callable[[Context, str, NDArray[Any], int], NDArray[np.uint64]]

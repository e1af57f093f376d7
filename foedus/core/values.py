"""The small values that pass between the parts of an algorithm."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from foedus.tree import Vector

Message = dict[str, NDArray[Any]]  # what travels and is merged
State = dict[str, NDArray[Any]]  # what the server keeps between rounds


class Update(NamedTuple):
    """What one client learned: ``vector`` = its weights after training − the weights it received, [parameter]."""

    vector: Vector
    weight: float


class Context(NamedTuple):
    """Whose update, and when: all that a client-side stage may base its randomness on."""

    seed: int
    round: int
    client: int

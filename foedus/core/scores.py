"""Scores: how every client's update looked beside the others, over rounds, and who should stay away for a while.

A score says how long an update was and which way it pointed: along the previous aggregate (which attackers of this
round did not make), along the aggregate of this round, and, where the server has examples of its own, how its loss
changes by this update alone. A :class:`History` is a value that grows by the scores of each round; a quarantine is a
pure function of it. A :class:`Watch` says what a run does of this: ``Settings(watch=Watch(...))``.

Scores need single updates: behind masks there are none (``core/gate.py``).

Not here: checks of one update by itself (``core/gate.py``), robust rules (``core/robust.py``), the plot
(``report``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.examples import Examples
from foedus.core.robust import blocks
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.tree import Vector

if TYPE_CHECKING:
    from jaxtyping import Int64


class Score(NamedTuple):
    """How one update looked.

    Attributes:
        norm: its length.
        previous: its cosine to the previous aggregate, −1 … 1; NaN if there is none.
        current: its cosine to the aggregate of this round.
        loss: by how much the loss on the server's own examples rises if this update alone is applied; NaN if it has
            none.
    """

    norm: float
    previous: float
    current: float
    loss: float = math.nan


def score(
    updates: Mapping[int, Vector], current: Vector, previous: Vector | None = None, *,
    losses: Mapping[int, float] | None = None,
) -> dict[int, Score]:  # fmt: skip
    """The scores of a round, by client.

    Args:
        updates: by client, each [parameter].
        current: this round's aggregate, [parameter].
        previous: the last one, if there is one.
        losses: by client, the change of the loss on the server's examples.

    Example:
        >>> found = score({3: np.array([2.0, 0.0]), 5: np.array([-1.0, 0.0])}, np.array([1.0, 0.0]))
        >>> found[3].norm, found[3].current, found[5].current
        (2.0, 1.0, -1.0)
    """
    clients = sorted(updates)
    if not clients:
        return {}
    references = np.stack([current, np.zeros_like(current) if previous is None else previous])
    inner, squares = np.zeros((len(clients), 2)), np.zeros(len(clients))
    for part, block in blocks([updates[c] for c in clients]):
        inner += block @ references[:, part].T
        squares += np.einsum("cp,cp->c", block, block)
    norms = np.sqrt(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = inner / (norms[:, None] * np.linalg.norm(references.astype(np.float64), axis=1))
    return {
        c: Score(float(norms[i]), float(cosines[i, 1]), float(cosines[i, 0]), (losses or {}).get(c, math.nan))
        for i, c in enumerate(clients)
    }


def current(score: Score) -> float:
    """The figure by which :func:`quarantine` judges unless told otherwise."""
    return score.current


class History(NamedTuple):
    """Every score so far, as arrays, so that a checkpoint holds them.

    Attributes:
        clients: positions, int64 [visit].
        rounds: int64 [visit].
        figures: float64 [visit, figure], in the order of :class:`Score`.

    Example:
        >>> history = History.empty().after(1, {4: Score(1.0, 0.5, 0.9)})
        >>> history.of(4)
        [Score(norm=1.0, previous=0.5, current=0.9, loss=nan)]
    """

    clients: NDArray[np.int64]
    rounds: NDArray[np.int64]
    figures: NDArray[np.float64]

    @staticmethod
    def empty() -> History:
        return History(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, len(Score._fields))))

    @staticmethod
    def of_state(state: State) -> History:
        """From what :meth:`state` gave."""
        return History(state["clients"], state["rounds"], state["figures"]) if state else History.empty()

    def state(self) -> State:
        """Arrays by name, for a checkpoint."""
        return dict(self._asdict())

    def after(self, round: int, scores: Mapping[int, Score]) -> History:
        """The history with the scores of one more round."""
        clients = sorted(scores)
        return History(
            np.concatenate([self.clients, np.array(clients, np.int64)]),
            np.concatenate([self.rounds, np.full(len(clients), round, np.int64)]),
            np.concatenate([self.figures, np.array([scores[c] for c in clients]).reshape(-1, len(Score._fields))]),
        )

    def of(self, client: int) -> list[Score]:
        """The scores of one client, oldest first."""
        return [Score(*row) for row in self.figures[self.clients == client].tolist()]


class Quarantine(NamedTuple):
    """Who stays away: ``away(history, round) -> positions`` int64 [client], in increasing order."""

    away: Callable[[History, int], NDArray[np.int64]]
    label: str


def quarantine(
    *,
    after: int = 3,
    below: float = 0.0,
    rounds: int = 50,
    of: Callable[[Score], float] = current,
) -> Quarantine:
    """A rule who stays away: each whose last ``after`` scores were all below a bound, for ``rounds`` rounds.

    Args:
        after: so many suspicious scores in a row; 3 and more, where honest clients may point elsewhere by chance.
        below: what is suspicious; NaN never is.
        rounds: then the client gets another chance, and has to be suspicious as often again.
        of: which figure of a score; by default the cosine to the round's aggregate. For the loss,
            ``lambda s: -s.loss`` with ``below=-0.5``.

    Example:
        >>> history = History.empty()
        >>> for round in (1, 2, 3):
        ...     history = history.after(round, {4: Score(1.0, 0.0, -0.5), 5: Score(1.0, 0.0, 0.5)})
        >>> rule = quarantine(after=3, rounds=10)
        >>> [rule.away(history, round).tolist() for round in (3, 4, 13, 14)]
        [[4], [4], [4], []]
    """
    check_whole("after", after, least=1)
    check_whole("rounds", rounds, least=1)

    def positions(history: History, round: int) -> Int64[NDArray[np.int64], " client"]:
        suspicious = [of(Score(*row)) < below for row in history.figures.tolist()]
        until = _away_until(history.clients.tolist(), history.rounds.tolist(), suspicious)
        return np.array(sorted(c for c, last in until.items() if round <= last), np.int64)

    def _away_until(clients: Sequence[int], seen: Sequence[int], suspicious: Sequence[bool]) -> dict[int, int]:
        """The last round of each client's last quarantine."""
        inarow, until = dict[int, int](), dict[int, int]()
        for client, at, bad in zip(clients, seen, suspicious, strict=True):
            inarow[client] = inarow.get(client, 0) + 1 if bad else 0
            if inarow[client] == after:
                until[client], inarow[client] = at + rounds, 0
        return until

    return Quarantine(positions, f"quarantine(after={after}, below={below}, rounds={rounds}, of={of.__name__})")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Every update of a run is scored (``scores.jsonl``), and refused while its client is in quarantine.

    Clients in quarantine are asked as before, so that the cohort of a round does not depend on how others ended;
    their updates are scored, and not merged. Scores are taken along the model's movement in this and in the last
    round.

    Attributes:
        quarantine: who stays away; ``None`` for nobody.
        examples: of the server's own, few; each update alone is evaluated on them.

    Example:
        >>> Watch(quarantine=quarantine(after=3)).label
        'Watch(quarantine(after=3, below=0.0, rounds=50, of=current))'
    """

    quarantine: Quarantine | None = None
    examples: Examples | None = None

    def __post_init__(self) -> None:
        for name, kind, example in (
            ("quarantine", Quarantine, "foedus.quarantine(after=3)"),
            ("examples", Examples, "data.train.take(slice(100))"),
        ):
            if (value := getattr(self, name)) is not None and not isinstance(value, kind):
                raise ConfigurationError(f"Watch({name}=...) takes e.g. {example}, and was given {value!r}")

    @property
    def label(self) -> str:
        given = [self.quarantine.label] if self.quarantine else []
        given += [f"{len(self.examples)} examples"] if self.examples is not None else []
        return f"Watch({', '.join(given)})"

    def away(self, state: State, round: int) -> NDArray[np.int64]:
        """Who is in quarantine in a round, from what the last rounds left."""
        if self.quarantine is None:
            return np.empty(0, np.int64)
        return self.quarantine.away(History.of_state(state), round)

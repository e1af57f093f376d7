"""Property inference: what kind of data does a client have, apart from what is learnt?

The attacker has data of its own with and without the property. It plays clients of both kinds, looks at their updates
through whatever protection there is, and fits a linear classifier on them; then it is asked about clients whose data it
has never seen (Melis, Song, De Cristofaro, Shmatikov 2019, "Exploiting unintended feature leakage in collaborative
learning", section IV; Ateniese et al. 2015).

The classifier is ridge regression in its dual form, on as many coefficients as there are played clients, so that
updates of any length are no matter. Not here: membership (``membership.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foedus.audit.membership import Membership, joined, scored
from foedus.audit.seen import Seen, Victim, look
from foedus.backends import Trainer, open_trainer
from foedus.core.aggregate import Aggregator
from foedus.core.checks import check_number, check_whole
from foedus.core.examples import Examples
from foedus.core.random import generator
from foedus.errors import ConfigurationError, DataError

Sight = Callable[[Victim, Sequence[Examples], Trainer], Seen]  # what is seen of a client among others


@dataclass(frozen=True, kw_only=True)
class Played:
    """The clients that an attacker plays, and those that it is tested on.

    Attributes:
        examples: of each client.
        share: of them that have the property, in clients that have it; the others have none.
        shadows: how many are played, half of them with the property.
        tested: how many it is asked about, with data that no played one has.
        others: how many clients without the property are in the sum that is seen, where only sums are seen.

    Example:
        >>> Played(examples=16, share=0.25).shadows
        60
    """

    examples: int = 32
    share: float = 0.5
    shadows: int = 60
    tested: int = 60
    others: int = 0

    def __post_init__(self) -> None:
        check_number("share", self.share, above=True)
        if self.share > 1:
            raise ConfigurationError(f"share is a share of a client's examples, in (0, 1]; not {self.share}")
        for name in ("examples", "shadows", "tested"):
            check_whole(name, getattr(self, name), least=2 if name != "examples" else 1)


def infer_property(
    victim: Victim, *, having: Examples, lacking: Examples, through: Aggregator | None = None,
    played: Played | None = None, sight: Sight | None = None,
) -> Membership:  # fmt: skip
    """Tell clients that have examples with a property from clients that have none, by one update each.

    Args:
        victim: task, model and local training; its examples are not looked at.
        having, lacking: examples with and without the property; half of each is the attacker's, the other half the
            tested clients'.
        through: the algorithm's aggregator.
        played: how many clients, and of what.
        sight: what the attacker gets of a client, where that is something else than ``look(..., through=through)``
            shows, e.g. ``lambda victim, others, trainer: intercept(victim, through=rule, trainer=trainer).upload``.

    Returns:
        Scores of tested clients with (``inside``) and without the property (``outside``).

    Raises:
        DataError: there are too few examples.

    Example:
        >>> found = infer_property(victim, having=thick, lacking=thin, through=mean())  # doctest: +SKIP
        >>> found.auc  # doctest: +SKIP
        0.97
    """
    played = Played() if played is None else played
    if min(len(having), len(lacking)) < 2 * played.examples:
        raise DataError(
            f"clients of {played.examples} examples need at least twice as many with and without the property; there "
            f"are {len(having)} and {len(lacking)}. Give more, or Played(examples=...)"
        )

    def plain(one: Victim, others: Sequence[Examples], trainer: Trainer) -> Seen:
        return look(one, through=through, others=others, trainer=trainer)

    cast = _Cast(victim, plain if sight is None else sight, played, open_trainer(victim.task, seed=victim.seed))
    own, theirs = ((e.take(slice(h, None, 2)) for e in (having, lacking)) for h in (0, 1))
    known, labels = cast.updates(*own, count=played.shadows, purpose="shadow")
    asked, truth = cast.updates(*theirs, count=played.tested, purpose="tested")
    scores = ridge(known, labels, asked)
    return scored(scores[truth > 0], scores[truth < 0], "property")


@dataclass(frozen=True)
class _Cast:
    """What makes the updates of played clients."""

    victim: Victim
    sight: Sight
    played: Played
    trainer: Trainer

    def updates(
        self, having: Examples, lacking: Examples, *, count: int, purpose: str
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Updates [client, parameter], and 1 or −1 for each: with the property, or without."""
        labels = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
        rows = [self._update(having, lacking, bool(y > 0), i, purpose) for i, y in enumerate(labels)]
        return np.stack(rows), labels

    def _update(self, having: Examples, lacking: Examples, has: bool, number: int, purpose: str) -> NDArray[np.float64]:
        draws = generator(self.victim.seed, "property", purpose, number)
        own = self._dealt(having, lacking, has, draws)
        others = [self._dealt(having, lacking, False, draws) for _ in range(self.played.others)]
        round = 1 + number + (purpose == "tested") * 10_000  # so that each has batches and noise of its own
        seen = self.sight(replace(self.victim, examples=own, round=round), others, self.trainer)
        return seen.update.astype(np.float64)

    def _dealt(self, having: Examples, lacking: Examples, has: bool, draws: np.random.Generator) -> Examples:
        size = self.played.examples
        some = max(1, round(size * self.played.share)) if has else 0
        rest = lacking.take(draws.choice(len(lacking), size - some, replace=False))
        return joined(having.take(draws.choice(len(having), some, replace=False)), rest) if some else rest


def ridge(
    known: NDArray[np.float64], labels: NDArray[np.float64], asked: NDArray[np.float64], *, strength: float = 0.1
) -> NDArray[np.float64]:
    """Scores of rows by ridge regression on known rows and labels, in the dual form.

    Args:
        known: [row, feature].
        labels: 1 or −1 for each.
        asked: rows to be scored.
        strength: of the penalty, as a share of the rows' mean squared length.

    Example:
        >>> ridge(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([1.0, -1.0]), np.array([[2.0, 0.0]])).round(1).tolist()
        [1.9]
    """
    mean = known.mean(axis=0)
    rows = known - mean
    products = rows @ rows.T
    weight = strength * float(np.trace(products)) / len(rows) + 1e-30
    coefficients = np.linalg.solve(products + weight * np.eye(len(rows)), labels - labels.mean())
    return np.asarray((asked - mean) @ rows.T @ coefficients)

"""What training by DP-SGD costs the single examples of one client, and when that client has to stop.

A client counts its own steps in a ledger of its own, which it keeps: nobody else can, and nobody else needs to be
trusted with it. The stop is a filter by Rényi divergences (``accounting.within``), so that it holds however many
examples the client has at each visit, and whatever else decides when it comes. A visit counts as a whole, before
anything that it made may leave.

Not here: the steps (``foedus.backends.private``), where ledgers are kept (``foedus.rounds``, ``foedus.net``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from numpy.typing import NDArray

from foedus.core.values import State
from foedus.privacy.accounting import rdp, within
from foedus.privacy.events import Event, Gaussian, Sampled
from foedus.privacy.ledger import Ledger, ledger_state, of_ledger_state

KEPT = "spending."  # what a client keeps of it is under such names


class Steps(NamedTuple):
    """So many steps of DP-SGD, of the same kind.

    Attributes:
        noise_multiplier: z.
        rate: with which every example is in a step's batch.
        taken: how many.

    Example:
        >>> Steps(1.1, 0.1, 30).event
        Sampled(rate=0.1, event=Gaussian(noise_multiplier=1.1))
    """

    noise_multiplier: float
    rate: float
    taken: int

    @staticmethod
    def of(noise_multiplier: float, batch_size: int, examples: int, taken: int) -> Steps:
        """The steps of a client with so many examples; numbers of examples are taken to be public."""
        return Steps(float(noise_multiplier), min(1.0, batch_size / examples), int(taken))

    @property
    def event(self) -> Event:
        """Of one step."""
        gaussian = Gaussian(self.noise_multiplier)
        return gaussian if self.rate == 1 else Sampled(self.rate, gaussian)


def after(ledger: Ledger, steps: Steps) -> Ledger:
    """The ledger with some steps more.

    Example:
        >>> after(after(Ledger(), Steps(1.0, 1.0, 3)), Steps(1.0, 1.0, 4)).counts
        ((Gaussian(noise_multiplier=1.0), 7),)
    """
    counts = dict(ledger.counts)
    if steps.taken:
        counts[steps.event] = counts.get(steps.event, 0) + steps.taken
    return replace(ledger, counts=tuple(counts.items()))


def refusal(ledger: Ledger, steps: Steps, budget: tuple[float, float]) -> str:
    """Why some steps more would be too much; ``""`` if they are not.

    Args:
        ledger: what was spent.
        steps: those of a whole visit.
        budget: ε and δ of every single example.

    Example:
        >>> refusal(Ledger(), Steps(1.0, 1.0, 1), (8.0, 1e-5))
        ''
        >>> refusal(after(Ledger(), Steps(1.0, 1.0, 2)), Steps(1.0, 1.0, 1), (8.0, 1e-5))
        'of ε = 8 at δ = 1e-05 for every single example 7.077 is spent, and 1 further step would make it 9.01'
    """
    (epsilon, delta), further = budget, after(ledger, steps).counts
    if not further or within(further, further[0][0], epsilon, delta):
        return ""
    spent, would = rdp(ledger.counts, delta), rdp(further, delta)
    told = f"{steps.taken} further step{'s' if steps.taken != 1 else ''}"
    return (
        f"of ε = {epsilon:g} at δ = {delta:g} for every single example {spent:.4g} is spent, and {told} would make it "
        f"{would:.4g}"
    )


def kept(ledger: Ledger) -> State:
    """A ledger as a client keeps it, by names of its own.

    Example:
        >>> of_kept(kept(Ledger())) == Ledger()
        True
    """
    return {KEPT + name: array for name, array in ledger_state(ledger).items()}


def of_kept(arrays: Mapping[str, NDArray[Any]]) -> Ledger:
    """The ledger among all that a client keeps; an empty one if it keeps none."""
    return of_ledger_state({n.removeprefix(KEPT): a for n, a in arrays.items() if n.startswith(KEPT)})

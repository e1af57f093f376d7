"""A run's privacy budget: counts every round in the ledger, and says when the next one would be too much.

The ledger lies in the run's state, and is written in the same checkpoint as the model that it counts; a run that goes
on from there repeats its rounds to the byte, noise included, and counts them once.

Not here: what a round is worth (``foedus.privacy``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from foedus.backends.private import PrivateDescent
from foedus.core.batches import taken
from foedus.core.client import LocalTraining
from foedus.core.compose import Algorithm
from foedus.core.select import Sampler
from foedus.core.timing import Hierarchical
from foedus.errors import NoGuarantee
from foedus.privacy.claims import example_epsilon, round_event
from foedus.privacy.events import Event
from foedus.privacy.ledger import Budget, Ledger, allows, charged, ledger_state, of_ledger_state, spent
from foedus.rounds.state import RunState
from foedus.rounds.work import Job


class Spending(NamedTuple):
    """What one round costs, and how much there is."""

    budget: Budget
    event: Event

    def stop(self, state: RunState) -> str | None:
        """Why there can be no further round, if so."""
        ledger = of_ledger_state(state.privacy)
        enough = allows(ledger, self.event, self.budget, round=state.round + 1)
        return None if enough else f"the privacy budget is spent: {self._told(ledger)}"

    def charge(self, state: RunState, number: int) -> None:
        """Count a round, before anything is made of it."""
        ledger = charged(of_ledger_state(state.privacy), self.event, round=number, budget=self.budget)
        state.privacy = ledger_state(ledger)

    def missed(self, state: RunState, last: int) -> None:
        """Count the rounds up to one, of which nothing else is known than that they may have been released: whether or
        not the budget allows it."""
        ledger = of_ledger_state(state.privacy)
        for number in range(state.round + 1, last + 1):
            ledger = charged(ledger, self.event, round=number)
        state.privacy = ledger_state(ledger)

    def line(self, state: RunState) -> dict[str, Any]:
        """Figures of the round's record: ε by Rényi divergences of all so far, and between which two situations."""
        ledger = of_ledger_state(state.privacy)
        against = self.event.neighbours.value
        return {"epsilon": spent(ledger, self.budget.delta), "delta": self.budget.delta, "against": against}

    def _told(self, ledger: Ledger) -> str:
        rounds, budget = sum(count for _, count in ledger.counts), self.budget
        if budget.planned:
            return f"all that was planned has taken place ({rounds} rounds)"
        return f"ε = {spent(ledger, budget.delta):.4g} of {budget.epsilon:g} at δ = {budget.delta:g}, {rounds} rounds"


def example_costs(job: Job, state: RunState) -> dict[int, dict[str, float | None]]:
    """What training by ``dp_sgd`` has cost the single examples of each client that was asked so far, by position;
    nothing where training is another. An ε of ``None``: it is not known, since a method may train more often than once
    in a visit, or not everybody's number of examples is."""
    spec, timing = job.algorithm.client, job.algorithm.timing
    loop = spec.loop if isinstance(spec, LocalTraining) else None
    often = isinstance(timing, Hierarchical) and timing.rounds > 1
    if not isinstance(loop, PrivateDescent):
        return {}
    asked = state.paid()
    if job.algorithm.method is not None or often or job.clients.sizes is None:
        return {c: {"example_epsilon": None, "example_delta": loop.delta} for c in asked.tolist()}
    sizes = job.clients.sizes[asked]
    steps = taken(spec, sizes) * state.costs[asked, 0].astype(np.int64)
    pairs = set(zip(sizes.tolist(), steps.tolist(), strict=True))
    found = {
        (n, k): example_epsilon(
            loop.noise_multiplier, batch_size=loop.batch_size, examples=n, steps=k, delta=loop.delta
        )
        for n, k in pairs
        if n
    }
    rows = zip(asked.tolist(), sizes.tolist(), steps.tolist(), strict=True)
    return {c: {"example_epsilon": found.get((n, k), 0.0), "example_delta": loop.delta} for c, n, k in rows}


def spending(algorithm: Algorithm, sampler: Sampler, budget: Budget | None, *, buffers: bool) -> Spending | None:
    """What a run spends; ``None`` if it has no budget.

    Args:
        algorithm: the run's.
        sampler: who is asked.
        budget: ``None`` for none.
        buffers: whether buffers are averaged.

    Raises:
        NoGuarantee: a round releases something that is not covered, or already the first would be too much.
    """
    if budget is None:
        return None
    found = Spending(budget, round_event(algorithm, sampler, hidden=budget.hidden, buffers=buffers))
    if not allows(Ledger(), found.event, budget):
        raise NoGuarantee(
            f"already one round, {found.event}, is beyond the budget {budget.label}. More noise is needed: "
            "foedus.calibrate() finds how much"
        )
    return found

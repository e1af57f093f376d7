"""A run's privacy budget: counts every round in the ledger, and says when the next one would be too much.

The ledger lies in the run's state, and is written in the same checkpoint as the model that it counts; a run that goes
on from there repeats its rounds to the byte, noise included, and counts them once.

Not here: what a round is worth (``foedus.privacy``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends.private import PrivateDescent
from foedus.core.batches import taken
from foedus.core.client import LocalTraining
from foedus.core.compose import Algorithm
from foedus.core.select import Sampler
from foedus.core.timing import Hierarchical
from foedus.core.values import State
from foedus.errors import NoGuarantee
from foedus.privacy.accounting import rdp
from foedus.privacy.claims import example_epsilon, round_event
from foedus.privacy.events import Event
from foedus.privacy.examples import KEPT, Steps, after, of_kept, refusal
from foedus.privacy.examples import kept as kept_ledger
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


# --- single examples ------------------------------------------------------------------------------------------


def private_loop(algorithm: Algorithm) -> PrivateDescent | None:
    """The steps of ``dp_sgd``, if clients train by it."""
    loop = algorithm.client.loop if isinstance(algorithm.client, LocalTraining) else None
    return loop if isinstance(loop, PrivateDescent) else None


def check_stop(algorithm: Algorithm) -> None:
    """Refuse a budget for single examples where a visit may be more than the one training that clients count.

    Raises:
        NoGuarantee: it may.
    """
    loop, method = private_loop(algorithm), algorithm.method
    if loop is None or loop.budget is None or method is None:
        return
    raise NoGuarantee(
        f"dp_sgd(budget={loop.budget:g}) ends a client's part by counting one training a visit, and {method.label} may "
        "train more often, or look at the data otherwise. Leave out the method, or the budget"
    )


def exhausted(
    algorithm: Algorithm, kept: Mapping[str, NDArray[Any]], examples: int, limit: int | NDArray[np.int64] | None
) -> str:
    """Why a client may not train once more, by what it keeps; ``""`` if it may.

    Args:
        algorithm: the run's.
        kept: all that the client keeps.
        examples: how many it has.
        limit: at most so many steps.
    """
    loop, steps = private_loop(algorithm), steps_of(algorithm, examples, limit)
    if loop is None or loop.budget is None or steps is None:
        return ""
    return refusal(of_kept(kept), steps, (loop.budget, loop.delta))


def steps_of(algorithm: Algorithm, examples: int, limit: int | NDArray[np.int64] | None) -> Steps | None:
    """The steps of a visit that has not begun; ``None`` where clients do not train by ``dp_sgd``, and only so."""
    loop = private_loop(algorithm)
    if loop is None or algorithm.method is not None:
        return None
    wanted = int(taken(algorithm.client, np.array([examples]))[0])
    return loop.steps(examples, wanted if limit is None else min(wanted, int(np.min(limit))))


def cost_of(algorithm: Algorithm, examples: int, steps: int) -> tuple[float, float, int] | None:
    """What a visit has cost its examples: noise multiplier, rate and steps of DP-SGD; ``None`` where there is none."""
    loop = private_loop(algorithm)
    if loop is None or algorithm.method is not None:
        return None
    found = loop.steps(examples, steps)
    return found.noise_multiplier, found.rate, found.taken


def counted(algorithm: Algorithm, kept: Mapping[str, NDArray[Any]], examples: int, steps: int) -> State:
    """What a client keeps of its spending after a visit; nothing where there is no budget for single examples."""
    loop = private_loop(algorithm)
    if loop is None or loop.budget is None:
        return {}
    return kept_ledger(after(of_kept(kept), loop.steps(examples, steps)))


def counted_anyhow(
    kept: Mapping[int, Mapping[str, NDArray[Any]]], before: Mapping[int, Mapping[str, NDArray[Any]]]
) -> dict[int, State]:
    """What clients keep after a round that came to nothing: as before, but for what they have spent."""
    own = {c: {n: a for n, a in arrays.items() if n.startswith(KEPT)} for c, arrays in kept.items()}
    return {c: {**before.get(c, {}), **arrays} for c, arrays in own.items() if arrays}


def example_costs(
    job: Job, state: RunState, kept: Callable[[list[int]], Mapping[int, Mapping[str, NDArray[Any]]]]
) -> dict[int, dict[str, float | None]]:  # fmt: skip
    """What training by ``dp_sgd`` has cost the single examples of each client that was asked so far, by position;
    nothing where training is another. An ε of ``None``: it is not known, since a method may train more often than once
    in a visit, or not everybody's number of examples is.

    Args:
        job: the run's.
        state: at its end.
        kept: what some clients keep: where there is a budget, they have counted for themselves.
    """
    loop, timing, asked = private_loop(job.algorithm), job.algorithm.timing, state.paid()
    if loop is None:
        return {}
    if loop.budget is not None:
        own = kept(asked.tolist())
        spent = {c: rdp(of_kept(own.get(c, {})).counts, loop.delta) for c in asked.tolist()}
        return {c: {"example_epsilon": found, "example_delta": loop.delta} for c, found in spent.items()}
    often = isinstance(timing, Hierarchical) and timing.rounds > 1
    if job.algorithm.method is not None or often or job.clients.sizes is None:
        return {c: {"example_epsilon": None, "example_delta": loop.delta} for c in asked.tolist()}
    spec = job.algorithm.client
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
        NoGuarantee: a round releases something that is not covered, or already the first would be too much; or
            clients cannot count what single examples spend.
    """
    check_stop(algorithm)
    if budget is None:
        return None
    found = Spending(budget, round_event(algorithm, sampler, hidden=budget.hidden, buffers=buffers))
    if not allows(Ledger(), found.event, budget):
        raise NoGuarantee(
            f"already one round, {found.event}, is beyond the budget {budget.label}. More noise is needed: "
            "foedus.calibrate() finds how much"
        )
    return found

"""What protects a federation, read off its algorithm: what the audit's report is about.

Not here: whether it helps (``parts.py`` measures), what to say of it (``words.py``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from foedus.audit.canaries import sending
from foedus.core.select import Population, Sampler, everybody, uniform
from foedus.core.task import Task
from foedus.errors import FoedusError
from foedus.privacy.accounting import rdp
from foedus.privacy.claims import round_event
from foedus.privacy.events import LocalGaussian, SharedGaussian, SharedSkellam
from foedus.sim.federation import Federation
from foedus.tree import Layout


@dataclass(frozen=True, kw_only=True)
class Protections:
    """What is switched on.

    Attributes:
        algorithm: its label.
        hidden: nobody but its client sees a single update (secure aggregation, or encryption).
        sealed: updates are encrypted under a key that the clients share, and the server sees no sum either.
        local: clients add noise before they send.
        shared: clients add shares of noise, of which only the sum over a cohort protects.
        noisy: noise is added, by whomever, before a model is released.
        bound: updates are clipped to about this length; ``None``: not at all.
        compares: the rule needs single updates, and cannot be hidden from the server.
        claimed: ε of the whole run by its accountant; ``None`` where nothing is claimed.
        refused: why nothing can be claimed, although noise is added.
        clients, cohort, rounds: how many there are, planned in a round, and in all.
        honest: fewest clients in a masked sum that do not collude; ``None`` without masks.
    """

    algorithm: str
    hidden: bool
    sealed: bool
    local: bool
    shared: bool
    noisy: bool
    bound: float | None
    compares: bool
    claimed: float | None
    refused: str | None
    clients: int
    cohort: float
    rounds: int
    honest: int | None = None

    def plain(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


def protections(federation: Federation, layout: Layout, *, delta: float) -> Protections:
    """What protects a federation.

    Args:
        federation: the one to look at.
        layout: of its model.
        delta: δ of the ε that it claims.
    """
    rule, sampler = federation.algorithm.aggregator, sampler_of(federation)
    length = sending(rule, layout, federation.seed)
    claimed, refused = _claimed(federation, sampler, delta) if rule.event is not None else (None, None)
    return Protections(
        algorithm=federation.algorithm.label, hidden=rule.hidden, sealed=rule.sealed is not None,
        local=isinstance(rule.event, LocalGaussian), shared=isinstance(rule.event, SharedGaussian | SharedSkellam),
        noisy=rule.event is not None, bound=None if length is None else length / 2, compares=not rule.additive,
        claimed=claimed, refused=refused, clients=len(federation.population()), cohort=_expected(sampler, federation),
        rounds=federation.rounds,
        honest=None if rule.masking is None else rule.masking.least - rule.masking.withstand.corrupted,
    )  # fmt: skip


def sampler_of(federation: Federation) -> Sampler:
    """Who is asked in a round."""
    cohort = federation.cohort
    if cohort is None:
        return everybody()
    return cohort if isinstance(cohort, Sampler) else uniform(int(cohort))


def _expected(sampler: Sampler, federation: Federation) -> float:
    return float(sampler.expected(Population(len(federation.population()), federation.population().sizes)))


def _claimed(federation: Federation, sampler: Sampler, delta: float) -> tuple[float | None, str | None]:
    budget = federation.settings.budget
    hidden = budget is not None and budget.hidden
    try:
        event = round_event(federation.algorithm, sampler, hidden=hidden, buffers=_buffers(federation.task))
        return rdp([(event, federation.rounds)], delta), None
    except FoedusError as error:
        return None, str(error)


def _buffers(task: Task) -> bool:
    from foedus.backends import open_trainer

    return task.average_buffers and open_trainer(task, seed=0).buffer_layout.size > 0

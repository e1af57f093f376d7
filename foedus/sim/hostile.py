"""Rounds with attackers among the clients: updates are taken one by one, and some are replaced before they are encoded.

Everything else is as in any other round: attackers' updates are encoded, checked, refused or merged like those of
others, in the order of clients.

Not here: the attacks (``core/attacks.py``), poisoned data (``core/poison.py``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from foedus.core.attacks import Adversary, corrupted
from foedus.core.values import SERVER, Context, State, Update
from foedus.sim.work import Collector, Given, Job, Orders, Outcome, Session, union
from foedus.tree import Layout


def attacked(
    session: Session, orders: Orders, adversary: Adversary, *, job: Job, layouts: tuple[Layout, Layout], state: State
) -> Outcome:  # fmt: skip
    """What a round brings in which some clients attack.

    Args:
        session: of the executor.
        orders: of the round.
        adversary: who attacks, and how.
        job: the run's.
        layouts: of parameters and buffers.
        state: what the aggregator keeps, which adaptive attackers know.
    """
    if orders.round < adversary.since or not np.isin(orders.cohort, adversary.clients).any():
        return union(job, [session.run(orders)])
    given = union(job, [session.run(replace(orders, single=True))]).given
    updates = {
        c: Update(g.contribution.update, _weight(g))
        for c, g in given.items()
        if g.contribution.update is not None
    }
    context = Context(job.seed, orders.round, SERVER, layouts[0], layouts[0].size)
    sent = corrupted(adversary, updates, context, state=state)
    collector = Collector(job, orders, layouts)
    for client in sorted(given):
        collector.again(client, _with(given[client], sent.get(client)))
    return union(job, [collector.outcome])


def _weight(given: Given) -> float:
    weight = given.contribution.weight
    return float(given.examples if weight is None else weight)


def _with(given: Given, update: Update | None) -> Given:
    """A client's result with the update that it really sends."""
    if update is None:
        return given
    return given._replace(contribution=given.contribution._replace(update=update.vector))

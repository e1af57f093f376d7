"""Rounds in which updates are taken one by one: some clients attack, or the server watches what each of them sends.

Attackers' updates are replaced before they are encoded; then all are encoded, checked, refused or merged like those
of any other round, in the order of clients. A watch refuses those in quarantine, and scores everybody once the round
is over.

Not here: the attacks (``core/attacks.py``), poisoned data (``core/poison.py``), scores (``core/scores.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from foedus.backends import Trainer, Weights
from foedus.core.attacks import Adversary, corrupted
from foedus.core.compose import Algorithm
from foedus.core.scores import History, Score, Watch, score
from foedus.core.values import SERVER, Context, Update
from foedus.errors import ConfigurationError
from foedus.rounds.collect import Collector
from foedus.rounds.state import RunState
from foedus.rounds.work import Given, Job, Orders, Outcome, Session, side_layout, union
from foedus.tree import Layout, Vector


class Singly(NamedTuple):
    """Who attacks and who watches in a run.

    Attributes:
        job: the run's.
        layouts: of parameters and buffers.
        adversary: the attackers; ``None`` for none.
        watch: ``None`` for none.
    """

    job: Job
    layouts: tuple[Layout, Layout]
    adversary: Adversary | None
    watch: Watch | None

    def bring(self, session: Session, orders: Orders, state: RunState) -> Outcome:
        """What a round brings; where it is watched, with what every client sent in ``Outcome.given``."""
        hostile = self._attacked(orders)
        if not hostile and self.watch is None:
            return union(self.job, [session.run(orders)])
        first = union(self.job, [session.run(replace(orders, single=True))])
        given: Mapping[int, Given] = first.given
        if hostile:
            given = self._corrupted(given, orders, state)
        away = set() if self.watch is None else set(self.watch.away(state.watch, orders.round).tolist())
        collector = Collector(self.job, orders, self.layouts)
        for client in sorted(given):
            if client in away:
                collector.refuse(client, given[client], f"in quarantine in round {orders.round}")
            else:
                collector.again(client, given[client])
        outcome = union(self.job, [collector.outcome])
        outcome.given, outcome.spent = {} if self.watch is None else dict(given), first.spent
        return outcome

    def _attacked(self, orders: Orders) -> bool:
        bad = self.adversary
        return bad is not None and orders.round >= bad.since and bool(np.isin(orders.cohort, bad.clients).any())

    def _corrupted(self, given: Mapping[int, Given], orders: Orders, state: RunState) -> dict[int, Given]:
        assert self.adversary is not None
        method, layout, found = self.job.algorithm.method, self.layouts[0], dict(given)
        context = Context(self.job.seed, orders.round, SERVER, layout, layout.size)
        if updates := {c: Update(v, _weight(given[c])) for c, v in _updates(given).items()}:
            sent = corrupted(self.adversary, updates, context, state=state.aggregator)
            found |= {c: _with(given[c], update.vector) for c, update in sent.items()}
        for name in sorted(() if method is None else method.updates):
            aside = {c: g.contribution.sides[name] for c, g in given.items() if name in g.contribution.sides}
            if not aside:
                continue
            size = len(next(iter(aside.values())))
            own = context._replace(layout=side_layout(name, size, layout), size=size, channel=name)
            updates = {c: Update(v, _weight(given[c])) for c, v in aside.items()}
            sent = corrupted(self.adversary, updates, own, state=state.sides.get(name))
            found |= {c: _beside(found[c], name, update.vector) for c, update in sent.items()}
        return found

    def scored(self, outcome: Outcome, before: Weights, state: RunState, trainer: Trainer) -> dict[int, Score]:
        """The scores of a round that is over, which ``state`` remembers.

        Args:
            outcome: of :meth:`bring`.
            before: the model that clients received.
            state: after the server's step.
            trainer: evaluates, if the watch has examples.
        """
        assert self.watch is not None
        sent = {c: v for c, v in _updates(outcome.given).items() if np.isfinite(v).all()}
        moved = state.weights.vector - before.vector
        losses = self._losses(sent, before, trainer)
        found = score(sent, moved, state.watch.get("previous"), losses=losses)
        state.watch = History.of_state(state.watch).after(state.round, found).state() | {"previous": moved}
        return found

    def _losses(self, sent: Mapping[int, Vector], before: Weights, trainer: Trainer) -> dict[int, float]:
        """By how much each update alone raises the loss on the server's examples."""
        assert self.watch is not None
        if (own := self.watch.examples) is None:
            return {}
        at_first = trainer.evaluate(before, own)["loss"]
        dtype = before.vector.dtype
        models = {c: Weights((before.vector + v).astype(dtype), before.buffers) for c, v in sent.items()}
        return {c: trainer.evaluate(model, own)["loss"] - at_first for c, model in models.items()}


def check_scored(algorithm: Algorithm, watch: Watch | None) -> None:
    """Refuse a watch over updates that nobody sees, or of which none is of the whole model, so that none could be
    scored."""
    method = algorithm.method
    if watch is not None and algorithm.aggregator.hidden:
        raise ConfigurationError(
            f"Settings(watch=...) scores every client's update, and {algorithm.aggregator.label} lets nobody see one. "
            "Leave out the watch; clients can check themselves: foedus.self_checked(within=...)"
        )
    if watch is not None and method is not None and method.updates:
        raise ConfigurationError(
            f"Settings(watch=...) scores every client's update of one model, and clients of {method.label} send "
            "updates of several models or parts. Leave out the watch; a gate and robust rules work with it: gate=..., "
            "aggregator=..."
        )


def _updates(given: Mapping[int, Given]) -> dict[int, Vector]:
    """The updates of those who sent one."""
    return {c: v for c, g in given.items() if (v := g.contribution.update) is not None}


def _weight(given: Given) -> float:
    weight = given.contribution.weight
    return float(given.examples if weight is None else weight)


def _with(given: Given, update: Vector) -> Given:
    """A client's result with the update that it really sends."""
    return given._replace(contribution=given.contribution._replace(update=update))


def _beside(given: Given, name: str, vector: Vector) -> Given:
    """A client's result with what it really sends in a channel."""
    brought = given.contribution
    return given._replace(contribution=brought._replace(sides={**brought.sides, name: vector}))

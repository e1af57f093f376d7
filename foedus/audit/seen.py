"""What an attacker sees of one client: its update, after whatever the algorithm does to it on the way.

An attack is only as good as what it is given, and what it is given depends on who attacks and on the protection. So
every attack on an update takes a :class:`Seen`, and :func:`look` makes one as the system itself would: the client
trains by the very trainer that simulation and network use, its update is encoded by the algorithm's aggregator,
admitted and decoded as the server would for a sum of one. Three things are special:

* noise that the *server* adds (``foedus.privacy.central``) is no secret from the server: it sees the clipped update;
* under secure aggregation the server sees the sum over a cohort only: give the ``others``;
* which examples are in which batch is counted randomness, a function of the seed, which every party knows.

Not here: the attacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Assignment, Trainer, Weights, open_trainer
from foedus.core.aggregate import Aggregator, fold, mean
from foedus.core.batches import Plan, plan
from foedus.core.client import Client, LocalSGD, local_sgd
from foedus.core.examples import Examples
from foedus.core.task import Task
from foedus.core.values import NOTHING, SERVER, Context, Message, Secret, Update
from foedus.errors import ConfigurationError
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.tree import Layout, Vector


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A client that is attacked, and when: all that its update is a function of.

    Attributes:
        task: what is learnt.
        before: the model that it receives.
        spec: how it trains.
        examples: its own; what the attacker is after.
        seed, client, round: of the run, its position, and when; they decide its batches and noise.

    Example:
        >>> from foedus.core.linear import logistic
        >>> task = Task(logistic(4, 2))
        >>> data = Examples.of(np.ones((6, 4)), [0, 1] * 3)
        >>> start = open_trainer(task, seed=0).initial()
        >>> int(Victim(task=task, before=start, spec=local_sgd(0.5, batch_size=2), examples=data).plan.steps[0])
        3
    """

    task: Task
    before: Weights
    spec: Client
    examples: Examples
    seed: int = 0
    client: int = 0
    round: int = 1

    @property
    def plan(self) -> Plan:
        """Its local steps."""
        sizes, clients = np.array([len(self.examples)]), np.array([self.client])
        return plan(self.spec, sizes, clients, seed=self.seed, round=self.round)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an attacker has of a client.

    Attributes:
        before: the model that the client received.
        update: [parameter], its weights after training − before, as far as it can be seen.
        sent: bool [parameter], which entries of the update are known at all; compression leaves some out.
        layout: where the model's arrays lie in it.
        spec: how clients train, which everybody knows.
        plan: the client's local steps, which whoever knows the seed and the number of examples knows.
        round: in which round it was.

    Example:
        >>> seen = look(victim, through=chain(top_k(0.01), mean()))  # doctest: +SKIP
        >>> seen.sent.mean()  # doctest: +SKIP
        0.01
    """

    before: Weights
    update: Vector
    sent: NDArray[np.bool_]
    layout: Layout
    spec: Client
    plan: Plan
    round: int = 1

    @property
    def examples(self) -> int:
        """How many examples the client trained on."""
        return int(self.plan.rows.max()) + 1

    @property
    def gradient(self) -> Vector:
        """The mean of the gradients that the client stepped along, [parameter]: exact for one plain step."""
        steps = max(int(self.plan.steps[0]), 1)
        found: Vector = -self.update / (self.spec.rate(self.round) * steps)
        return found


def look(
    victim: Victim, *, through: Aggregator | None = None, others: Sequence[Examples] = (),
    outside: bool = False, trainer: Trainer | None = None,
) -> Seen:  # fmt: skip
    """Carry out a client's local training, and see what an attacker sees of it.

    Where clients take one step on all of their data, a sum over a cohort is the step of one client with everybody's
    examples, and is seen as that: who attacks a sum looks for all of them.

    Args:
        victim: who, and when.
        through: the algorithm's aggregator; ``None`` for the update as it is.
        others: examples of the other clients of its cohort, where the server sees their sum only (secure aggregation).
        trainer: an open one of the same task, to save time.

    Raises:
        ConfigurationError: the victim has no examples, or trains by a loop or optimiser of its own, which cannot be
            undone step by step.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.linear import logistic
        >>> task = Task(logistic(4, 2))
        >>> start = open_trainer(task, seed=0).initial()
        >>> data = Examples.of(np.ones((1, 4)), [1])
        >>> seen = look(Victim(task=task, before=start, spec=local_sgd(0.5, batch_size=None), examples=data))
        >>> seen.update.shape, seen.examples
        ((10,), 1)
    """
    if not isinstance(victim.spec, LocalSGD):
        raise ConfigurationError(
            f"an update can be undone where clients train by plain steps, and these train by {victim.spec.label}. Give "
            "Victim(spec=foedus.local_sgd(...)): what an attacker would guess"
        )
    if not len(victim.examples):
        raise ConfigurationError("a client without examples sends nothing that could be attacked")
    trainer = open_trainer(victim.task, seed=victim.seed) if trainer is None else trainer
    rule, layout = mean() if through is None else through, trainer.layout
    told = NOTHING if rule.tell is None else rule.tell(rule.init(layout))
    context = Context(victim.seed, victim.round, victim.client, layout=layout, size=layout.size, told=told)
    own = trained(victim, victim.examples, trainer)
    messages = alike(rule, own, context, weight=len(victim.examples), others=len(others))
    for number, examples in enumerate(others, 1):
        vector = trained(victim, examples, trainer)
        messages.append(passed(rule, vector, context._replace(client=victim.client + number), weight=len(examples)))
    update = opened(rule, messages, context, secret=known_to_all_who_know_the_seed if outside else without_noise)
    return Seen(
        before=victim.before, update=update.astype(own.dtype), sent=_sent(update, own), layout=layout,
        spec=victim.spec, plan=pooled(victim, others), round=victim.round,
    )  # fmt: skip


def pooled(victim: Victim, others: Sequence[Examples]) -> Plan:
    """The victim's steps; or, where everybody takes a single one, that of all examples together."""
    own = victim.plan
    if not others or own.steps[0] > 1:
        return own
    total = np.array([len(victim.examples) + sum(map(len, others))])
    return plan(local_sgd(1.0, steps=1, batch_size=None), total, np.zeros(1, np.int64), seed=victim.seed, round=1)


def passed(
    rule: Aggregator, vector: Vector, context: Context, *, weight: float,
    secret: Secret = known_to_all_who_know_the_seed,
) -> Message:  # fmt: skip
    """One client's update, encoded and admitted: what lies at the server before anything is merged. Noise of the
    client's own is in it, drawn from ``secret``."""
    context = context._replace(secret=secret)
    return rule.admit(rule.encode(Update(vector, float(weight)), context), context)


def alike(
    rule: Aggregator, vector: Vector, context: Context, *, weight: float, others: int = 0,
    secret: Secret = known_to_all_who_know_the_seed,
) -> list[Message]:  # fmt: skip
    """One client's admitted message; or, for a rule that shows nothing of so few, as many of the same as it needs.

    A rule that compares updates is shown each of them, and gives back what all of them are.

    Args:
        rule: the aggregator.
        vector: the update.
        context: the client's.
        weight: how much it counts.
        others: how many further messages will be there.
        secret: where noise is drawn from.
    """
    least = floor_of(rule)
    if others + 1 >= least:
        return [passed(rule, vector, context, weight=weight, secret=secret)]
    contexts = [context._replace(client=context.client + i) for i in range(least)]
    return [passed(rule, vector, each, weight=weight, secret=secret) for each in contexts]


def floor_of(rule: Aggregator) -> int:
    """Fewest messages of which anything is shown."""
    under = 1 if rule.masking is None else rule.masking.least
    return max(rule.least, under, 1 if rule.sealed is None else rule.sealed.least)


def room_of(rule: Aggregator) -> int | None:
    """Most messages that a sum has room for; ``None`` for any number."""
    if rule.masking is not None:
        return int(rule.masking.withstand.clients)
    return None if rule.sealed is None else rule.sealed.silos


def opened(rule: Aggregator, messages: Sequence[Message], context: Context, *, secret: Secret | None = None) -> Vector:
    """What can be read of admitted messages, [parameter]: decoded, by default without the noise that the server adds
    itself, with noise from ``secret`` if that is given."""
    copies = [{name: array.copy() for name, array in message.items()} for message in messages]
    total = fold(rule, copies)
    assert total is not None
    state = rule.init(context.layout) if context.layout is not None else {}
    vector, _ = rule.decode(state, total, context._replace(client=SERVER, secret=secret or without_noise))
    return vector


def without_noise(context: Context, purpose: str, about: NDArray[Any], count: int) -> NDArray[np.uint64]:
    """A source of noise that gives none: words for which a table of noise gives 0: whoever adds the noise knows
    what it is without it."""
    return np.zeros(count, np.uint64)


def trained(victim: Victim, examples: Examples, trainer: Trainer) -> Vector:
    """The update of a client with these examples."""
    sizes, clients = np.array([len(examples)]), np.array([victim.client])
    steps = plan(victim.spec, sizes, clients, seed=victim.seed, round=victim.round)
    work = Assignment(victim.spec, examples, steps, victim.round, victim.client)
    after: Vector = trainer.train(victim.before, work).weights.vector
    return after - victim.before.vector


def _sent(update: Vector, own: Vector) -> NDArray[np.bool_]:
    """Which entries an attacker takes for known: all; or, where the algorithm leaves entries out, those that are
    there."""
    leaves_out = ((update == 0) & (own != 0)).mean() > 0.05
    found: NDArray[np.bool_] = update != 0
    return found if leaves_out else np.ones(len(own), bool)

"""Disaggregation: a cheating server makes a sum over many clients say what one of them sent.

Secure aggregation hides updates in a sum. A server that sends *different models to different clients* gets around it
without touching any cryptography: the victim gets the real model, all others one in which every unit is switched off,
so that their gradients are zero nearly everywhere and the sum, there, is the victim's update alone (Pasquini, Francati,
Ateniese 2022, "Eluding secure aggregation in federated learning via model inconsistency").

What helps is that clients agree on the model before they reveal anything: masks that are bound to a digest of it do not
cancel if it differs. Other ways of cheating, with shares asked for twice or masks that come late, are attacks on the
protocol, and its tests carry them out.

Not here: reading examples out of the update that is revealed (``inversion.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foedus.audit.seen import Seen, Victim, look, opened, passed, trained
from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.aggregate import Aggregator, mean
from foedus.core.examples import Examples
from foedus.core.values import Context
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

_OFF = -1e3  # a bias that switches units off: sigmoids and ReLUs are 0 there, with a slope of 0


@dataclass(frozen=True, kw_only=True)
class Disaggregated:
    """What a sum reveals of one client.

    Attributes:
        seen: the victim's update as the server works it out, where it can be, for ``invert``.
        exposed: the share of its entries that are revealed.
        likeness: the cosine of the angle between what is revealed and what the victim really sent, over these entries.
        honest: the same for a sum over clients that all got the same model.
        clients: how many were summed up.

    Example:
        >>> disaggregate(victim, others).figures()  # doctest: +SKIP
        {'exposed': 0.9999, 'likeness': 1.0, 'honest': 0.42, 'clients': 20}
    """

    seen: Seen
    exposed: float
    likeness: float
    honest: float
    clients: int

    def figures(self) -> dict[str, float]:
        """For a record."""
        return {"exposed": self.exposed, "likeness": self.likeness, "honest": self.honest, "clients": self.clients}


def disaggregate(victim: Victim, others: Sequence[Examples], *, through: Aggregator | None = None) -> Disaggregated:
    """Send the others a model that is switched off, and read the victim's update out of the sum.

    Args:
        victim: who gets the real model.
        others: the examples of the rest of its cohort.
        through: the algorithm's aggregator: one that adds up.

    Raises:
        ConfigurationError: the aggregator does not add up; or the model cannot be switched off by its biases.

    Example:
        >>> found = disaggregate(victim, [clients.train(i) for i in range(1, 20)])  # doctest: +SKIP
        >>> rebuilt = invert(task, found.seen, known)  # doctest: +SKIP
    """
    rule, trainer = mean() if through is None else through, open_trainer(victim.task, seed=victim.seed)
    if not rule.additive:
        raise ConfigurationError(
            f"{rule.label} needs single updates, which the server therefore sees: there is no sum to take apart"
        )
    alone = look(victim, through=rule, trainer=trainer)
    dead = switched_off(victim.before, trainer.layout)
    revealed = _revealed(replace(victim, before=dead), trainer)
    if revealed.mean() < 0.5:
        raise ConfigurationError(
            f"only {revealed.mean():.0%} of this model's gradient can be switched off by its biases, so that the "
            "others' updates would hide the victim's. The attack needs biases before ReLUs or sigmoids"
        )
    honest = look(victim, through=rule, others=others, trainer=trainer).update
    total = len(victim.examples) + sum(map(len, others))
    sums = _sum(victim, dead, others, rule, trainer)
    scaled = sums * (total / len(victim.examples))
    return Disaggregated(
        seen=replace(alone, update=scaled.astype(alone.update.dtype), sent=revealed),
        exposed=float(revealed.mean()),
        likeness=_likeness(scaled[revealed], alone.update[revealed]),
        honest=_likeness(honest[revealed], alone.update[revealed]),
        clients=1 + len(others),
    )


def switched_off(before: Weights, layout: Layout) -> Weights:
    """The model with every bias but the last far below zero, so that its units give nothing, whatever they are
    given."""
    vector = before.vector.copy()
    single = [name for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) == 1]
    for name in single[:-1]:
        vector[layout.slice(name)] = _OFF
    return Weights(vector, before.buffers.copy())


def _revealed(victim: Victim, trainer: Trainer) -> NDArray[np.bool_]:
    """Where clients with the switched-off model send nothing: tried out on the victim's kind of data."""
    still: NDArray[np.bool_] = look(victim, trainer=trainer).update == 0
    return still


def _sum(victim: Victim, dead: Weights, others: Sequence[Examples], rule: Aggregator, trainer: Trainer) -> Vector:
    """The sum over the cohort, the victim with the real model and the others with the dead one."""
    context = Context(
        victim.seed, victim.round, victim.client, layout=trainer.layout, size=trainer.layout.size,
        told={} if rule.tell is None else rule.tell(rule.init(trainer.layout)),
    )  # fmt: skip
    messages = [passed(rule, trained(victim, victim.examples, trainer), context, weight=len(victim.examples))]
    for number, examples in enumerate(others, 1):
        vector = trained(replace(victim, before=dead), examples, trainer)
        messages.append(passed(rule, vector, context._replace(client=victim.client + number), weight=len(examples)))
    return opened(rule, messages, context)


def _likeness(a: Vector, b: Vector) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-30))

"""The attacks of an audit, each on a whole federation: what it takes, and the figures that come out.

Each part is a function of a :class:`Ground` and gives plain figures that JSON holds; a part that cannot be carried out
raises one of foedus's errors, whose message goes into the report.

Not here: which parts there are and in which order (``examine.py``), what the figures mean (``words.py``).
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.audit.canaries import Empirical, Lookout, canaries_in, in_final_model, in_messages, with_canaries
from foedus.audit.membership import by_loss
from foedus.audit.protections import sampler_of
from foedus.audit.quality import judge
from foedus.audit.seen import Victim, floor_of, look
from foedus.backends import Trainer, Weights
from foedus.core.checks import check_number, check_whole
from foedus.core.client import Client, LocalSGD, local_sgd
from foedus.core.examples import Examples
from foedus.core.random import generator
from foedus.core.select import Population
from foedus.errors import ConfigurationError, DataError, MissingExtra
from foedus.rounds.evaluate import Evaluation
from foedus.sim.federation import Federation, run_federation
from foedus.sim.run import Run
from foedus.tree import Vector

Figures = dict[str, Any]  # plain numbers, texts, and lists of them

LEAST = 20  # examples of either kind, below which membership is not measured
SOME = 50  # clients whose data is looked at, where there are more
SUMMED = 16  # clients in a sum that is to be taken apart, where more would take long
LOOKED_AT = 100  # updates of one client that the server puts together, where there are more
OTHERS = 500  # examples of other clients that the mean example is made of


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard an audit tries, and where it keeps what it finds.

    Attributes:
        canaries: how many are in the run that measures ε; 0 for none.
        delta: δ of every ε.
        examples: members, and as many others, at most, that membership is told of.
        sizes: of the batches that are to be rebuilt from an update; empty for none.
        steps: of the search for each of these.
        folder: for findings, figures and the report; by default ``audit`` in the run's folder. What is finished in it
            is not done again.
        progress: show a bar.

    Example:
        >>> Effort(canaries=64, sizes=(1,)).delta
        1e-05
    """

    canaries: int = 32
    delta: float = 1e-5
    examples: int = 500
    sizes: tuple[int, ...] = (1, 4)
    steps: int = 300
    folder: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.canaries:
            check_whole("canaries", self.canaries, least=2, also=", or 0 for none")
        check_number("delta", self.delta, below=1, above=True)
        check_whole("examples", self.examples)
        check_whole("steps", self.steps)
        object.__setattr__(self, "sizes", tuple(self.sizes))
        for size in self.sizes:
            check_whole("sizes: a batch's size", size)


@dataclass
class Ground:
    """What the parts of an audit work on.

    Attributes:
        federation: whose run is attacked.
        run: finished.
        trainer: of its task.
        first: the weights that it started from.
        effort: how hard to try.
        folder: of the audit.
        arrays: what figures are drawn of, by name.
    """

    federation: Federation
    run: Run
    trainer: Trainer
    first: Weights
    effort: Effort
    folder: Path
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def layout(self) -> Any:
        """Of what travels."""
        return self.trainer.layout


# --- membership ---------------------------------------------------------------------------------------------


def membership(ground: Ground) -> Figures:
    """Whether examples that were trained on can be told from others by the final model.

    Raises:
        DataError: there are no examples that were not trained on.
    """
    members, others = _members(ground), _others(ground)
    count = min(len(members), len(others), ground.effort.examples)
    if count < LEAST:
        raise DataError(
            f"membership is measured with at least {LEAST} examples that were trained on and as many of the same kind "
            f"that were not; there are {len(members)} and {len(others)}. Give the clients a test part "
            "(clients.split(...)), or the server one (clients.with_test(...))"
        )
    inside, outside = (_sample(e, count, ground, name) for e, name in ((members, "members"), (others, "others")))
    found = by_loss(ground.federation.task, ground.run.weights, members=inside, others=outside)
    ground.arrays |= {"membership inside": found.inside, "membership outside": found.outside}
    return found.figures() | {"members": count}


def _members(ground: Ground) -> Examples:
    clients = ground.federation.population()
    draws = generator(ground.federation.seed, "audited clients")
    chosen = np.sort(draws.choice(len(clients), min(SOME, len(clients)), replace=False)).tolist()
    return Examples.concat([e for i in chosen if len(e := clients.train(i))])


def _others(ground: Ground) -> Examples:
    clients = ground.federation.population()
    if clients.central_test is not None:
        return clients.central_test
    parts = [e for i in range(min(SOME, len(clients))) if (e := clients.test(i)) is not None and len(e)]
    if not parts:
        raise DataError(
            "membership is told by comparing with examples that nobody trained on, and there are none. Give the "
            "clients a test part, clients.split(test=0.2), or the server one, clients.with_test((x, y))"
        )
    return Examples.concat(parts)


def _sample(examples: Examples, count: int, ground: Ground, name: str) -> Examples:
    rows = generator(ground.federation.seed, "audit", name).choice(len(examples), count, replace=False)
    return examples.take(np.sort(rows))


# --- canaries -----------------------------------------------------------------------------------------------


def canaries(ground: Ground) -> Figures:
    """ε as canaries measure it: for the holder of the final model, for who sees every model, for the server."""
    federation, effort = ground.federation, ground.effort
    entered = canaries_in(federation)
    found: Figures = {}
    if entered is None:
        last, lookout = _rerun(ground)
        count = lookout.count
        found["rerun"] = True
        if lookout.rows:
            found["every model"] = _told(ground, lookout.found(effort.delta), "every model")
    else:
        last, count = ground.run.weights.vector, entered
        found["rerun"] = False
    final = in_final_model(ground.first.vector, last, seed=federation.seed, count=count, delta=effort.delta)
    found["final model"] = _told(ground, final, "final model")
    rule = federation.algorithm.aggregator
    if rule.additive and rule.remember is None and not rule.hidden:  # else nobody sees one
        sent = _messages(ground)
        for name, count in (("message", 1), ("messages", min(sent, LOOKED_AT))):
            told = in_messages(
                rule, ground.layout, seed=federation.seed, count=16, delta=effort.delta, messages=count
            )  # fmt: skip
            found[name] = _told(ground, told, name) | {"sent": sent, "looked at": count}
    return found


def _messages(ground: Ground) -> int:
    """How many updates a client sends in the whole run, about."""
    clients = ground.federation.population()
    cohort = sampler_of(ground.federation).expected(Population(len(clients), clients.sizes))
    return max(1, math.ceil(ground.federation.rounds * min(1.0, cohort / len(clients)) - 1e-9))


def _rerun(ground: Ground) -> tuple[Vector, Lookout]:
    """The same federation once more, with canaries: its last weights, and what was seen on the way."""
    federation, effort = ground.federation, ground.effort
    with_them = with_canaries(federation, ground.layout, count=effort.canaries)
    lookout = Lookout(federation.seed, canaries_in(with_them) or 0)
    server = with_them.algorithm.server

    def step(state: Any, vector: Vector, update: Vector, round: int) -> Any:
        after, state = server.step(state, vector, update, round)
        lookout.see(vector, after)
        return after, state

    watched = replace(with_them.algorithm, server=server._replace(step=step))
    folder = ground.folder / "with canaries"
    shutil.rmtree(folder, ignore_errors=True)  # of an audit that was interrupted: what it saw is gone
    settings = replace(with_them.settings, folder=folder, progress=False, budget=None, sinks=())
    run = run_federation(replace(with_them, algorithm=watched, settings=settings, evaluation=Evaluation(every=0)))
    return run.weights.vector, lookout


def _told(ground: Ground, found: Empirical, name: str) -> Figures:
    ground.arrays |= {f"canaries {name}": found.observed, f"directions {name}": found.unseen}
    return found.figures() | {"statistic": found.label}


# --- inversion ----------------------------------------------------------------------------------------------


def inversion(ground: Ground) -> Figures:
    """Whether examples can be rebuilt from one client's update: of a single step, and as clients really train.

    Raises:
        ConfigurationError: the model or its inputs are of a kind that cannot be searched for.
    """
    spec = ground.federation.algorithm.client
    ways: dict[str, Client] = {"one step on all": local_sgd(_rate(spec), batch_size=None)}
    if isinstance(spec, LocalSGD) and (spec.epochs, spec.batch_size) != (1, None):
        ways["as configured"] = spec
    client, examples = _chosen(ground)
    clients = ground.federation.population()
    sizes = [len(clients.train(i)) for i in range(min(len(clients), SOME))] if clients.sizes is None else clients.sizes
    found: Figures = {"client": clients.ids[client], "median": float(np.median(sizes)), "trials": []}
    for way, how in ways.items():
        for size in ground.effort.sizes:
            if size <= len(examples):
                found["trials"].append({"way": way, "size": size} | _inverted(ground, client, how, examples, size, way))
    return found


def _inverted(ground: Ground, client: int, spec: Client, examples: Examples, size: int, way: str) -> Figures:
    try:
        from foedus.audit.inversion import Knowledge, cosine, invert
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "torch", "torch", "Gradient inversion") from error
    federation = ground.federation
    own, others = examples.take(np.arange(size)), _mean_of_others(ground, client)
    victim = Victim(
        task=federation.task, before=ground.first, spec=spec, examples=own, seed=federation.seed, client=client
    )
    rule, summed = federation.algorithm.aggregator, _summed(ground, client, size)
    seen = look(victim, through=rule, others=summed, trainer=ground.trainer)
    knowledge = Knowledge(shape=own.inputs[0].shape[1:], limits=_limits(examples), classes=_classes(ground, examples))
    by = cosine(steps=ground.effort.steps, smoothness=1e-2 if own.inputs[0].ndim >= 4 else 0.0)
    try:
        got = invert(federation.task, seen, knowledge, by=by, seed=federation.seed)
    except ConfigurationError as error:
        if "labels" not in str(error):
            raise
        got = invert(federation.task, seen, replace(knowledge, labels=own.targets), by=by, seed=federation.seed)
    judged = judge(got.inputs, own.inputs[0], baseline=others, limits=knowledge.limits)
    name = f"inversion {way} {size}"
    ground.arrays |= {f"{name} original": own.inputs[0], f"{name} rebuilt": got.inputs[list(judged.order)]}
    return judged.figures() | {"clients": 1 + len(summed)}


def _summed(ground: Ground, client: int, size: int) -> list[Examples]:
    """Examples of those whose updates are in the sum with the client's; nobody's where the server sees single ones."""
    rule, clients = ground.federation.algorithm.aggregator, ground.federation.population()
    if not rule.hidden:
        return []
    cohort = sampler_of(ground.federation).expected(Population(len(clients), clients.sizes))
    count = max(floor_of(rule), min(round(cohort), SUMMED)) - 1
    found = (clients.train(i) for i in range(len(clients)) if i != client)
    return [
        e.take(np.arange(min(size, len(e)))) for e, _ in zip((e for e in found if len(e)), range(count), strict=False)
    ]


def _rate(spec: Client) -> float:
    return spec.rate(1) or 0.1


def _chosen(ground: Ground) -> tuple[int, Examples]:
    """The first client with as many examples as are to be rebuilt, once they are of a kind that can be."""
    clients, wanted = ground.federation.population(), max(ground.effort.sizes)
    sized = ((i, clients.train(i)) for i in range(min(len(clients), 10 * SOME)))
    best = max(((i, e) for i, e in sized if len(e)), key=lambda pair: min(len(pair[1]), wanted), default=None)
    if best is None:
        raise DataError("none of the clients looked at has examples")
    position, examples = best
    if len(examples.inputs) > 1 or examples.inputs[0].dtype.kind != "f":
        told = [f"{a.dtype}{list(a.shape[1:])}" for a in examples.inputs]
        raise ConfigurationError(
            f"gradient inversion searches for one input of real numbers, and this model takes {', '.join(told)}. "
            "That does not mean that nothing can be learnt: words, say, are read off the gradient of an embedding"
        )
    return position, examples


def _mean_of_others(ground: Ground, client: int) -> NDArray[Any]:
    """The mean example of others, which an attacker that sees nothing would guess."""
    clients, parts, count = ground.federation.population(), list[NDArray[Any]](), 0
    for i in range(min(len(clients), SOME)):
        if (i != client or len(clients) == 1) and count < OTHERS:
            parts.append(clients.train(i).inputs[0][:OTHERS])
            count += len(parts[-1])
    mean: NDArray[Any] = np.concatenate(parts)[:OTHERS].mean(axis=0)
    return mean


def _limits(examples: Examples) -> tuple[float, float]:
    """The range of inputs, which an attacker knows."""
    low, high = float(examples.inputs[0].min()), float(examples.inputs[0].max())
    return (low, high) if high > low else (low - 1.0, low + 1.0)


def _classes(ground: Ground, examples: Examples) -> int | None:
    """How many classes there are, as the model's outputs tell; ``None`` where targets are numbers."""
    if examples.targets.dtype.kind not in "iu" or examples.targets.ndim != 1:
        return None
    output = ground.trainer.predict(ground.first, examples.take(np.arange(1)))
    return int(output.shape[-1]) if output.ndim == 2 and output.shape[-1] > 1 else None

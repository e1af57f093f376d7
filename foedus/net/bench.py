"""What the training process works on: the owner's data, one task, and the round at hand.

The order of requests is: ``data`` (who reads it says how many examples there are, and what the owner's checks say),
``open`` (a task out of a source bundle that is approved), and then, round by round, ``train`` and ``encode``,
``evaluate``, or ``finish``; for a task that encrypts, ``key`` and ``decrypt``. Training and encoding are apart because
in buffered runs the server says how much a stale update counts only when it is about to be sent; between both, the
result lies here, in memory.

A client is trained by the executor ``debug`` of the simulator, with a population of one at the position that the server
knows it by: whatever is counted from (seed, round, client) is the same.

Not here: the pipe (``trainee.py``), what is kept from round to round (the agent; it comes and goes as bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.aggregate import Sealed
from foedus.core.compose import Algorithm
from foedus.core.population import Clients
from foedus.core.task import Task
from foedus.core.timing import Buffered, Hierarchical
from foedus.core.values import State
from foedus.errors import ConfigurationError, MalformedMessage, SecureAggregationFailed
from foedus.net.bundle import import_bundle
from foedus.net.owner.checks import examine
from foedus.net.owner.rules import Checks, Finding
from foedus.net.source import imported, of_bytes, own, placed
from foedus.privacy.examples import Steps, after, refusal
from foedus.privacy.examples import kept as kept_ledger
from foedus.privacy.ledger import Ledger
from foedus.protocol import blob
from foedus.rounds.debug import DebugSession
from foedus.rounds.evaluate import ClientFigures
from foedus.rounds.freight import closed_of, figures_blob, opened_blob, orders_of, update_blob
from foedus.rounds.masks import masked_together, promise_of, sealed_update
from foedus.rounds.parcel import Parcel, Terms, admitted, outward, packed
from foedus.rounds.spending import check_stop, cost_of, steps_of
from foedus.rounds.untold import noised, release_of, too_much, trained_in_private
from foedus.rounds.visits import layouts_of
from foedus.rounds.work import UPDATE, Given, Job, Orders, held_out

__all__ = ["Bench"]

Said = dict[str, Any]
Blobs = tuple[bytes, ...]
Done = tuple[Said, Blobs]


class _Open(NamedTuple):
    """A task that is open, and for whom."""

    name: tuple[Any, ...]
    job: Job
    trainer: Trainer
    first: Weights


class _Visit(NamedTuple):
    """The simulator's executor over a population of one, its job, and the orders for it."""

    job: Job
    session: DebugSession
    orders: Orders


class _Round(NamedTuple):
    """What was trained and is not encoded yet."""

    orders: Orders
    given: Given


class Spent(NamedTuple):
    """What single examples have spent before a visit, and the most that their owner allows.

    Attributes:
        here: in this run.
        all: in all runs.
        most: ε and δ; ``None`` where the owner asks for nothing.
    """

    here: Ledger
    all: Ledger
    most: tuple[float, float] | None

    @staticmethod
    def of(said: Said) -> Spent:
        """From what the agent says."""
        most = said.get("most")
        bound = None if most is None else (float(most), float(said["delta"]))
        return Spent(ledger_of(said.get("here", ())), ledger_of(said.get("all", ())), bound)

    def kept(self) -> State:
        """What this client keeps of it, as in a simulation."""
        return kept_ledger(self.here) if self.here.counts else {}

    def refusal(self, job: Job, orders: Orders) -> str:
        """Why the owner's rule lets the visit not take place; ``""`` if it does."""
        if self.most is None:
            return ""
        examples = len(job.clients.at(orders.round).train(int(orders.cohort[0])))
        steps = steps_of(job.algorithm, examples, orders.most(slice(None)))
        if steps is None:
            return (
                f"{job.algorithm.label} does not train by dp_sgd() alone, and protections.most_example_epsilon = "
                f"{self.most[0]:g} asks for it"
            )
        return refusal(self.all, steps, self.most)


def ledger_of(rows: Sequence[Sequence[float]]) -> Ledger:
    """A ledger of rows: noise multiplier, rate, steps."""
    found = Ledger()
    for noise_multiplier, rate, taken in rows:
        found = after(found, Steps(float(noise_multiplier), float(rate), int(taken)))
    return found


class Bench:
    """The state of the training process.

    Args:
        folder: where files and modules of the owner's data are looked for, unless a request says so.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._source: tuple[Any, ...] = ()
        self._given: Any = None
        self._mine: Clients | None = None
        self._open: _Open | None = None
        self._round: _Round | None = None

    def do(self, said: Said, blobs: Blobs) -> Done:
        """Carry out one request."""
        verbs: dict[str, Callable[[Said, Blobs], Done]] = {
            "data": self._data,
            "open": self._opened,
            "promise": self._promise,
            "release": self._release,
            "key": self._keyed,
            "decrypt": self._decrypt,
            "train": self._train,
            "encode": self._encode,
            "evaluate": self._evaluate,
            "finish": self._finish,
        }
        return verbs[str(said["do"])](said, blobs)

    def _data(self, said: Said, blobs: Blobs) -> Done:
        """Read the owner's data; how many examples there are, and what the checks say."""
        source = (said.get("target"), said.get("folder"), said.get("part"), *blobs)
        if blobs:
            self._mine = of_bytes(blobs[0])
        else:
            if source != self._source:
                self._given = imported(str(said["target"]), Path(said.get("folder") or self._folder))
            self._mine = own(self._given, str(said.get("part") or ""))
        self._source, self._round = source, None
        examples = self._mine.at(int(said.get("round", 1))).train(0)
        findings: list[Finding] = examine(Checks(**said["checks"]), examples) if len(examples) else []
        return {"examples": len(examples), "findings": [list(finding) for finding in findings]}, ()

    def _opened(self, said: Said, _: Blobs) -> Done:
        """Import a task, which the owner approved, and make its model; once for many rounds."""
        name = tuple(said[key] for key in ("bundle", "digest", "target", "seed"))
        if self._open is None or self._open.name != name:
            task, algorithm = _task_of(import_bundle(Path(said["bundle"]), bytes(said["digest"]), said["target"]))
            check_stop(algorithm)
            trainer = open_trainer(task, seed=int(said["seed"]))
            nobody = Clients.generated(lambda i: ([[0.0]], [0]), 1)
            job = Job(task, algorithm, nobody, int(said["seed"]))
            self._open, self._round = _Open(name, job, trainer, trainer.initial()), None
        job, algorithm = self._open.job, self._open.job.algorithm
        return {
            "algorithm": algorithm.label,
            "stale": isinstance(
                algorithm.timing, Buffered
            ),  # the server says how much an update counts before it is encoded
            "personal": algorithm.method is not None and algorithm.method.personal is not None,
            "masked": _masked(job, self._open.trainer),
            "sealed": 0 if (sealed := self._sealed()) is None else sealed.least,
            "noised": noised(algorithm) or trained_in_private(algorithm),
        }, ()

    def _sealed(self) -> Sealed | None:
        opened = self._opened_task()
        return sealed_update(opened.job.algorithm, buffers=_averaged(opened.job, opened.trainer))

    def _keyed(self, _: Said, blobs: Blobs) -> Done:
        """Take the key that the silos share, for a task that encrypts."""
        opened, sealed = self._opened_task(), self._sealed()
        if sealed is None:
            raise ConfigurationError("this task encrypts nothing, and takes no key")
        algorithm = replace(opened.job.algorithm, aggregator=sealed.keyed(blobs[0]))
        self._open = opened._replace(job=replace(opened.job, algorithm=algorithm))
        return {}, ()

    def _decrypt(self, said: Said, blobs: Blobs) -> Done:
        """What the sum of a round's encrypted updates opens to, if it is what a client can answer for."""
        opened, sealed = self._opened_task(), self._sealed()
        assert sealed is not None
        terms = Terms.of(opened.job, replace(_NOBODY, round=int(said["round"])), layouts_of(opened.trainer))
        context = terms.context(int(said["position"]), UPDATE, terms.layout(UPDATE, 0).size)
        try:
            message = closed_of(blob.unpack(blobs[0]), run=str(said["run"]), round=int(said["round"]))
            found = sealed.open(message, context)
        except (SecureAggregationFailed, MalformedMessage) as error:
            return {"refused": str(error)}, ()
        return {"refused": ""}, (opened_blob(found, blob.digest_of(blobs[0])),)

    def _promise(self, said: Said, blobs: Blobs) -> Done:
        """What the code of a task that masks promises, for these orders."""
        job, _, orders = self._visit(said, blobs)
        promise = promise_of(Terms.of(job, orders, layouts_of(self._opened_task().trainer)))
        channels = [list(channel) for channel in promise.channels]
        return {"promise": {"withstand": asdict(promise.withstand), "least": promise.least, "channels": channels}}, ()

    def _release(self, said: Said, blobs: Blobs) -> Done:
        """What the update of these orders will be once it leaves with noise of its own; and why it would be too much
        for its owner, after others that have left."""
        job, _, orders = self._visit(said, blobs)
        parts = job.algorithm.timing.rounds if isinstance(job.algorithm.timing, Hierarchical) else 1
        if not 0 <= orders.part < parts:
            raise MalformedMessage(f"the orders are of part {orders.part} of a round, and there are {parts}")
        kind, why = release_of(job.algorithm, buffers=_averaged(job, self._opened_task().trainer))
        told = ""
        if said.get("most") is not None:
            told = too_much(kind, why, said.get("kinds", {}), (float(said["most"]), float(said["delta"])))
        return {"part": orders.part, "kind": kind, "told": told}, ()

    def _train(self, said: Said, blobs: Blobs) -> Done:
        """Train on the orders of a round."""
        job, session, orders = self._visit(said, blobs)
        position, spent = int(orders.cohort[0]), Spent.of(said.get("spent", {}))
        if told := spent.refusal(job, orders):
            return {"trained": False, "spent": told}, ()
        kept = {**orders.kept.get(position, {}), **spent.kept()}
        outcome = session.run(replace(orders, single=True, kept={position: kept}))
        if position not in outcome.given:
            return {"trained": False} | ({"spent": outcome.spent[position]} if position in outcome.spent else {}), ()
        given = outcome.given[position]
        self._round = _Round(orders, given)
        cost = cost_of(job.algorithm, given.examples, outcome.steps[0])
        return {"trained": True, "steps": outcome.steps[0], "loss": outcome.losses[0], "cost": cost}, ()

    def _encode(self, said: Said, _: Blobs) -> Done:
        """What was trained, as it is sent; and what the client keeps if it counts."""
        if self._round is None:
            raise ConfigurationError("there is nothing to encode: train first")
        opened, (orders, given) = self._opened_task(), self._round
        orders = replace(orders, scale=float(said.get("scale", 1.0)))
        terms = Terms.of(opened.job, orders, layouts_of(opened.trainer))
        parcel = packed(terms, int(orders.cohort[0]), given.contribution, given.examples)
        kept = [] if parcel.kept is None else [blob.pack({n: np.asarray(a) for n, a in parcel.kept.items()})]
        if not parcel.masked:
            return {"keeps": bool(kept)}, (update_blob(outward(opened.job.algorithm, parcel)), *kept)
        return {"keeps": bool(kept)}, (blob.pack(_added_up(terms, int(orders.cohort[0]), parcel)), *kept)

    def _evaluate(self, said: Said, blobs: Blobs) -> Done:
        """How good the model of some orders is on what the client holds out; and its own model, if it has one."""
        job, session, orders = self._visit(said, blobs)
        opened, position = self._opened_task(), int(orders.cohort[0])
        examples = held_out(job.clients.at(orders.round), position)
        weights = Weights(orders.start.vector, orders.buffers(position))
        method, personal = opened.job.algorithm.method, None
        if method is not None and method.personal is not None:
            personal = opened.trainer.evaluate(session.personal(orders), examples)
        found = ClientFigures(len(examples), opened.trainer.evaluate(weights, examples), personal)
        return {"examples": len(examples)}, (figures_blob(found),)

    def _finish(self, said: Said, blobs: Blobs) -> Done:
        """The final model as named tensors; and the client's own, if the algorithm gives it one."""
        _, session, orders = self._visit(said, blobs)
        opened, position = self._opened_task(), int(orders.cohort[0])
        models = [Weights(orders.start.vector, orders.buffers(position))]
        method = opened.job.algorithm.method
        if said.get("personal") and method is not None and method.personal is not None:
            models.append(session.personal(orders))
        return {"personal": len(models) > 1}, tuple(blob.pack(_named(opened.trainer, model)) for model in models)

    def _visit(self, said: Said, blobs: Blobs) -> _Visit:
        opened, position = self._opened_task(), int(said["position"])
        if self._mine is None:
            raise ConfigurationError("there is no data yet: it is read before a task is trained")
        job = replace(opened.job, clients=placed(self._mine, position))
        travels = Terms.of(job, _NOBODY, layouts_of(opened.trainer)).travels
        orders = orders_of(blob.unpack(blobs[0]), opened.first, travels)
        kept = {position: dict(blob.unpack(blobs[1]).arrays)} if len(blobs) > 1 else {}
        limit = int(said.get("limit", 0)) or None
        orders = replace(orders, cohort=np.array([position]), kept=kept, limit=limit)
        return _Visit(job, DebugSession(job, opened.trainer, secret=None), orders)

    def _opened_task(self) -> _Open:
        if self._open is None:
            raise ConfigurationError("there is no task yet: it is opened before it is trained")
        return self._open


_NOBODY = Orders(1, Weights(np.empty(0), np.empty(0)), np.empty(0, np.int64))


def _task_of(found: Any) -> tuple[Task, Algorithm]:
    """Task and algorithm of what a bundle's target names."""
    if callable(found) and not isinstance(getattr(found, "task", None), Task):
        found = found()
    task, algorithm = getattr(found, "task", None), getattr(found, "algorithm", None)
    if not isinstance(task, Task) or not isinstance(algorithm, Algorithm):
        raise ConfigurationError(
            f"the bundle's object is of type {type(found).__name__}, and has no task and algorithm; a "
            "foedus.Federation has"
        )
    return task, algorithm


def _added_up(terms: Terms, client: int, parcel: Parcel) -> dict[str, NDArray[Any]]:
    """What a masked sum adds up of a parcel, by channel.

    Raises:
        SecureAggregationFailed: something that others send is not in it.
    """
    wanted = [channel.name for channel in promise_of(terms).channels]
    if missing := [name for name in wanted if name not in parcel.messages]:
        raise SecureAggregationFailed(
            f"this visit brought nothing in {', '.join(map(repr, missing))}, and masks cancel only where all clients "
            "of a round send the same channels: it is in no sum"
        )
    return {name: message["sum"] for name, message in admitted(terms, client, parcel).items()}


def _masked(job: Job, trainer: Trainer) -> bool:
    found = masked_together(job.algorithm, trainer.layout, buffers=_averaged(job, trainer))
    return found is not None


def _averaged(job: Job, trainer: Trainer) -> bool:
    return job.task.average_buffers and trainer.buffer_layout.size > 0


def _named(trainer: Trainer, weights: Weights) -> dict[str, NDArray[Any]]:
    """A model's arrays by name, as a file of weights has them."""
    return {**trainer.layout.unflatten(weights.vector), **trainer.buffer_layout.unflatten(weights.buffers)}

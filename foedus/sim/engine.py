"""The simulation engine: cohort → local training → merge → decode → server step, round after round.

Everything that a round depends on lies in :class:`~foedus.sim.state.RunState` and in counted randomness, so a
run killed at any moment goes on from its last checkpoint and ends with the same bytes as one never killed.

Not here: how local training is carried out (the executors), what files look like (``foedus.record``).
"""

from __future__ import annotations

import hashlib
import math
import reprlib
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.aggregate import message_bytes
from foedus.core.batches import processed
from foedus.core.checks import check_whole, whole
from foedus.core.compose import Algorithm
from foedus.core.population import Clients
from foedus.core.select import Population, Sampler, everybody, uniform
from foedus.core.task import Task
from foedus.core.values import Context, Update
from foedus.errors import CheckpointError, ConfigurationError, DataError, NothingToAggregate
from foedus.record import RunFolder
from foedus.record.folder import CLIENTS, LOCAL, METRICS, TIMINGS, new_folder
from foedus.record.folder import read as read_record
from foedus.sim import evaluate, start
from foedus.sim.executors import open_session
from foedus.sim.local_curves import attach
from foedus.sim.progress import Progress, announce, into_sinks, progress
from foedus.sim.run import Run
from foedus.sim.settings import Evaluation, Settings
from foedus.sim.state import COSTS, RunState
from foedus.sim.work import Job, Orders, Outcome, Session, union
from foedus.sim.world import Load, Passage, pass_round


def simulate(
    task: Task,
    algorithm: Algorithm,
    clients: Clients,
    *,
    rounds: int,
    cohort: int | Sampler | None = None,
    seed: int = 0,
    evaluation: Evaluation | None = None,
    settings: Settings | None = None,
) -> Run:
    """Run a federation on this machine.

    Args:
        task: model, loss and metrics.
        algorithm: e.g. ``fedavg(local_sgd(lr=0.1))``.
        clients: the population, see :mod:`foedus.data`.
        rounds: how many rounds in all. A folder that holds fewer is continued, one that holds more is refused.
        cohort: clients per round: a number (drawn uniformly without replacement), a sampler, or ``None`` for
            all clients.
        seed: everything random is a function of it.
        evaluation: by default the central test set after every round.
        settings: executor, run folder, simulated world, ...

    Returns:
        The run: ``run.metrics``, ``run.model``, ``run.plot()``, ``run.folder``.

    Raises:
        ConfigurationError: the parts do not fit together.
        TrainingError: the model or loss raised; says client, round, step.
        CheckpointError: the folder holds another run, or a damaged one.

    Example:
        >>> run = simulate(task, fedavg(local_sgd(lr=0.1)), clients, rounds=10, cohort=5)  # doctest: +SKIP
    """
    evaluation = Evaluation() if evaluation is None else evaluation
    settings = Settings() if settings is None else settings
    _check_kinds(task, algorithm, clients)
    _check_how(evaluation, settings)
    _check_counts(rounds, seed)
    rounds, seed = int(rounds), int(seed)  # numpy's own do not fit into JSON
    _check_data(clients)
    evaluate.check_targets(evaluation.stop_at, task.metrics, central=clients.central_test is not None)
    sampler, wanted = _sampler(cohort, clients, settings)
    _check_minimum(settings, most=wanted or len(clients))
    trainer = open_trainer(task, seed=seed, device=settings.device)
    job = Job(task, algorithm, clients, seed, settings.device)
    plan = _Plan(job, trainer, sampler, wanted, rounds, evaluation, settings)
    folder = RunFolder(_folder(settings), more=_files(evaluation, settings))
    try:
        return _Engine(plan, folder).run()
    finally:
        folder.close()


class _Plan(NamedTuple):
    """All that was asked for."""

    job: Job
    trainer: Trainer
    sampler: Sampler
    wanted: int | None  # clients a round, where that is a number; a world may ask more of them
    rounds: int
    evaluation: Evaluation
    settings: Settings

    @property
    def population(self) -> Population:
        return Population(len(self.job.clients), self.job.clients.sizes)

    def cohort(self, number: int) -> NDArray[np.int64]:
        """Who is asked in a round: positions, each once."""
        population = self.population
        asked = np.asarray(self.sampler.sample(population, self.job.seed, number))
        sound = asked.ndim == 1 and (asked.dtype.kind in "iu" or not asked.size)
        if not sound or len(np.unique(asked)) < len(asked) or ((asked < 0) | (asked >= population.count)).any():
            raise ConfigurationError(
                f"the sampler {self.sampler.label} must give different positions from 0 to {population.count - 1}, "
                f"and gave {reprlib.repr(asked.tolist())} in round {number}"
            )
        return asked.astype(np.int64, copy=False)

    def identity(self) -> str:
        """A digest of all that a resumed run must share with the interrupted one; the number of rounds may grow."""
        job, world = self.job, self.settings.world
        parts = (
            job.algorithm.label, job.clients.fingerprint(), job.seed, self.sampler.label,
            self.trainer.layout.digest(), self.trainer.buffer_layout.digest(), self.trainer.backend,
            self.evaluation.every, self.evaluation.clients, [m.name for m in job.task.metrics],
            job.task.average_buffers, _name(job.task.loss), world and world.label,
            start.describe(self.settings.start),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        job = self.job
        return {
            "algorithm": job.algorithm.label,
            "cohort": self.sampler.label,
            "rounds": self.rounds,
            "seed": job.seed,
            "clients": len(job.clients),
            "parameters": self.trainer.layout.size,
            "buffers": self.trainer.buffer_layout.size,
            "backend": self.trainer.backend,
            "device": self.trainer.device,
            "metrics": [m.name for m in job.task.metrics],
            "better": {"loss": "min"} | {m.name: "min" if m.better is min else "max" for m in job.task.metrics},
        }


class _Engine:
    """One run: owns the folder, the state and the executor's session."""

    def __init__(self, plan: _Plan, folder: RunFolder) -> None:
        self.plan, self.folder = plan, folder
        self.identity = plan.identity()
        self.state, self.executor_name = self._restored()
        self._saved_at = time.monotonic()
        self._whole = True  # whether state and metrics.jsonl are those of the same round
        self._coming: tuple[int, _Called] | None = None  # the next round's call, where it has been made already

    # --- beginning and end

    def _restored(self) -> tuple[RunState, str | None]:
        found = self.folder.configuration()
        if found is None:
            return self._fresh(), None
        if not self.plan.settings.resume:
            raise ConfigurationError(
                f"{self.folder.path} holds a run already. Choose another folder, or let it go on: Settings(resume=True)"
            )
        if found.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.folder.path} holds another run: {_difference(found, self.plan.describe())}. "
                "Choose another folder, or delete this one"
            )
        saved = self.folder.restore()
        if saved is None:
            return self._fresh(), found.get("executor")
        state = RunState.restored(saved, len(self.plan.job.clients))
        if state.stopped is not None:  # what to stop at may be another figure now
            evaluation, metrics = self.plan.evaluation, self.plan.job.task.metrics
            central = read_record(self.folder.path).final
            state.stopped = evaluate.reached(central, evaluation.stop_at, metrics)
        if state.round > self.plan.rounds:
            raise ConfigurationError(
                f"{self.folder.path} holds {state.round} rounds of this run already, and rounds={self.plan.rounds} "
                f"asks for fewer; rounds cannot be taken back. Write rounds={state.round}, or more, choose another "
                "folder, or look at what is there: foedus.read_run(folder)"
            )
        return state, saved.values["executor"]

    def _fresh(self) -> RunState:
        plan, algorithm = self.plan, self.plan.job.algorithm
        weights = start.weights(plan.settings.start, plan.trainer)
        return RunState(
            round=0,
            weights=weights,
            server=algorithm.server.init(weights.vector),
            aggregator=algorithm.aggregator.init(plan.trainer.layout),
            buffers=algorithm.buffers.init(plan.trainer.buffer_layout),
            costs=np.zeros((len(plan.job.clients), len(COSTS))),
        )

    def run(self) -> Run:
        if self._finished():
            # None yet: no rounds were wanted. Running: it was killed after its last checkpoint.
            if (self.folder.configuration() or {}).get("status") != "finished":
                self._finish(self.executor_name)
            announce(self.plan.settings.progress, f"nothing to train: {self._farewell()}")
            return self._result()
        settings = self.plan.settings
        with (
            progress(settings.progress, self.plan.rounds, self.state.round) as bar,
            into_sinks(bar, settings.sinks, self.folder.path, self.plan.describe()) as shown,
        ):
            with self._session(shown) as session:
                self._configure(session.name, "running")
                try:
                    while not self._finished():
                        self._round(session, shown)
                except KeyboardInterrupt:
                    if self._whole:
                        self._save(session)
                    shown.say(f"interrupted; the same call with folder={str(self.folder.path)!r} goes on")
                    raise
                self._save(session)
                self._finish(session.name)
            shown.say(self._farewell())
        return self._result()

    def _finished(self) -> bool:
        return self.state.round >= self.plan.rounds or self.state.stopped is not None

    def _session(self, shown: Progress) -> Session:
        settings = self.plan.settings
        if settings.local_curves is not None:
            return attach(settings.local_curves, self.plan.job, self.plan.trainer, self.folder)
        probe = self.plan.cohort(self.state.round + 1)
        orders = Orders(self.state.round + 1, self.state.weights, probe)
        left = self.plan.rounds - self.state.round
        return open_session(
            settings.executor, self.plan.job, orders, rounds=left, again=self.executor_name, say=shown.say
        )

    def _configure(self, executor: str | None, status: str) -> None:
        values = self.plan.describe() | {
            "identity": self.identity,
            "executor": executor,
            "status": status,
            "foedus": start.versions(),
        }
        self.folder.configure(values)

    def _finish(self, executor: str | None) -> None:
        trainer, weights = self.plan.trainer, self.state.weights
        named = trainer.layout.unflatten(weights.vector) | trainer.buffer_layout.unflatten(weights.buffers)
        self.folder.save_model(named, {"identity": self.identity, "round": str(self.state.round)})
        ids = self.plan.job.clients.ids
        costs = self.state.costs
        self.folder.save_costs(
            {"client": ids[c], **dict(zip(COSTS, costs[c].tolist(), strict=True))} for c in self.state.paid().tolist()
        )
        self._configure(executor, "finished")

    def _farewell(self) -> str:
        why = f" ({self.state.stopped})" if self.state.stopped else ""
        return f"{self.state.round} rounds done{why}; everything is in {self.folder.path}"

    def _result(self) -> Run:
        self.folder.flush()
        return Run(read_record(self.folder.path), self.state.weights, self.plan.trainer)

    # --- a round

    def _round(self, session: Session, shown: Progress) -> None:
        clock = _Clock()
        state, plan = self.state, self.plan
        number = state.round + 1
        asked, load, passage, cohort = self._called(number)
        orders = Orders(number, state.weights, cohort, state.kept, following=self._following(number))
        self._whole = plan.settings.local_curves is None  # its lines are written while the round is under way
        outcome = union(plan.job, [session.run(orders)])
        clock.lap("train")
        self._whole = False
        self._step(outcome, number, enough=passage is None or len(cohort) >= _minimum(plan.settings))
        clock.lap("aggregate")
        line = self._line(outcome, asked, passage, load)
        line |= self._evaluation(number)
        clock.lap("evaluate")
        self.folder.append(METRICS, line)
        self.folder.append(TIMINGS, clock.line(number))
        self._whole = True
        if time.monotonic() - self._saved_at >= plan.settings.checkpoint_seconds:
            self._save(session)
        shown.advance(line, clock.total())

    def _step(self, outcome: Outcome, number: int, *, enough: bool) -> None:
        """Decode the merged messages and let the server take its step."""
        state, algorithm = self.state, self.plan.job.algorithm
        if outcome.clients and len(outcome.refused) == len(outcome.clients):
            raise self._nothing(outcome, number)
        vector, buffers = state.weights
        if outcome.message is not None and enough:
            update, state.aggregator = algorithm.aggregator.decode(state.aggregator, outcome.message)
            vector, state.server = algorithm.server.step(state.server, vector, update, number)
            if outcome.buffers is not None:
                change, state.buffers = algorithm.buffers.decode(state.buffers, outcome.buffers)
                buffers = (buffers + change).astype(buffers.dtype)
            state.kept.update(outcome.kept)
        state.weights = Weights(vector, buffers)
        state.round = number

    def _nothing(self, outcome: Outcome, number: int) -> NothingToAggregate:
        ids = self.plan.job.clients.ids
        told = "; ".join(f"client {ids[r.client]!r}: {r.reason}" for r in outcome.refused[:3])
        return NothingToAggregate(
            f"round {number}: every one of the {len(outcome.clients)} updates was refused as not finite ({told}). "
            "The model has diverged or the data holds NaN: try a smaller learning rate, clip_norm in local_sgd(), or "
            "look at one client with executor=foedus.executors.debug()",
            round=number,
        )

    def _called(self, number: int) -> _Called:
        """Who takes part in a round: a function of the seed and the number, never of how other rounds ended."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == number:
            return coming[1]
        asked = self.plan.cohort(number)
        load = self._load(asked)
        passage = self._passage(asked, load, number)
        return _Called(asked, load, passage, asked if passage is None else asked[passage.counted])

    def _following(self, number: int) -> NDArray[np.int64] | None:
        """Who trains in the round after; None if there is none, or a fault that will be told when its turn comes."""
        if number >= self.plan.rounds:
            return None
        with suppress(Exception):
            self._coming = number + 1, self._called(number + 1)
        return None if self._coming is None else self._coming[1].cohort

    def _load(self, asked: NDArray[np.int64]) -> Load:
        """Bytes and examples of the round, per client; examples only where a world asks for them."""
        job, weights = self.plan.job, self.state.weights
        empty = Update(np.zeros_like(weights.vector), 1.0)
        up = message_bytes(job.algorithm.aggregator.encode(empty, Context(job.seed, 0, 0)))
        if job.task.average_buffers:
            up += weights.buffers.nbytes
        work = np.zeros(len(asked), np.int64)
        if self.plan.settings.world is not None:
            work = _work(job, asked)
        return Load(weights.vector.nbytes + weights.buffers.nbytes, up, work)

    def _passage(self, asked: NDArray[np.int64], load: Load, number: int) -> Passage | None:
        world = self.plan.settings.world
        if world is None:
            return None
        goal = self.plan.wanted or max(1, math.ceil(len(asked) / world.over_selection - 1e-9))
        return pass_round(world, asked, load, goal=goal, seed=self.plan.job.seed, round=number)

    def _line(
        self, outcome: Outcome, asked: NDArray[np.int64], passage: Passage | None, load: Load
    ) -> dict[str, Any]:
        """The round's line in metrics.jsonl."""
        ids = self.plan.job.clients.ids
        up = np.where(np.isin(asked, outcome.clients), load.up, 0) if passage is None else passage.up  # none: no data
        down = np.full(len(asked), load.down) if passage is None else passage.down
        compute, energy = (passage.compute, passage.energy) if passage else (np.zeros(len(asked)), np.zeros(len(asked)))
        self._account(asked, np.stack([np.ones(len(asked)), up, down, compute, energy], axis=-1))
        line: dict[str, Any] = {
            "round": self.state.round,
            "cohort": len(asked),
            "trained": len(outcome.clients),
            "examples": sum(outcome.examples),
            "steps": int(np.sum(outcome.steps)),
            "train_loss": _train_loss(outcome),
            "bytes_up": int(up.sum()),
            "bytes_down": int(down.sum()),
        }
        if outcome.refused:
            line["refused"] = [{"client": ids[r.client], "reason": r.reason} for r in outcome.refused]
        if passage is not None:
            self.state.simulated_seconds += passage.seconds
            line["simulated"] = {
                "seconds": passage.seconds,
                "elapsed_seconds": self.state.simulated_seconds,
                "dropped": int(passage.dropped.sum()),
                "late": int(passage.late.sum()),
                "compute_seconds": float(compute.sum()),
                "energy_joules": float(energy.sum()),
            }
        return line

    def _account(self, asked: NDArray[np.int64], rows: NDArray[np.float64]) -> None:
        self.state.costs[asked] += rows

    def _evaluation(self, number: int) -> dict[str, Any]:
        plan, asked = self.plan, self.plan.evaluation
        if not asked.every or (number % asked.every and number != plan.rounds):
            return {}
        found = evaluate.evaluate(plan.job, plan.trainer, self.state, clients=asked.clients)
        for client, (examples, figures) in found.clients.items():
            self.folder.append(CLIENTS, {"round": number, "client": client, "examples": examples} | figures)
        central = found.figures.get("central", {})
        self.state.stopped = evaluate.reached(central, asked.stop_at, plan.job.task.metrics)
        return found.figures

    def _save(self, session: Session) -> None:
        self.folder.checkpoint(self.state.checkpoint(self.identity, session.name))
        self._saved_at = time.monotonic()


class _Called(NamedTuple):
    """Positions of the clients asked, int64 [C]; what each has to do; what becomes of them in a simulated world;
    and those whose updates count."""

    asked: NDArray[np.int64]
    load: Load
    passage: Passage | None
    cohort: NDArray[np.int64]


class _Clock:
    """Seconds by phase of one round."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def total(self) -> float:
        return time.perf_counter() - self._begin

    def line(self, number: int) -> dict[str, Any]:
        laps = {name: round(seconds, 6) for name, seconds in self._laps.items()}
        at = datetime.now().isoformat("T", "seconds")
        return {"round": number, "seconds": round(self.total(), 6), **laps, "at": at}


def _check_kinds(task: Any, algorithm: Any, clients: Any) -> None:
    asked = (("first", task, Task), ("second", algorithm, Algorithm), ("third", clients, Clients))
    for place, value, kind in asked:
        if not isinstance(value, kind):
            raise ConfigurationError(
                f"simulate(task, algorithm, clients): the {place} must be a foedus.{kind.__name__}, and is of type "
                f"{type(value).__name__}{_HINTS.get(type(value).__name__, '')}"
            )


def _check_data(clients: Clients) -> None:
    if clients.sizes is not None and not clients.sizes.any():
        raise DataError(f"none of the {len(clients)} clients has a single training example")


def _check_minimum(settings: Settings, *, most: int) -> None:
    """Refuse a world in which no round can ever count."""
    if _minimum(settings) > most:
        raise ConfigurationError(
            f"World(minimum={_minimum(settings)}): no round can have so many answers, since at most {most} clients are "
            "wanted; the model would never change"
        )


def _check_how(evaluation: Any, settings: Any) -> None:
    for name, value, kind in (("evaluation", evaluation, Evaluation), ("settings", settings, Settings)):
        if not isinstance(value, kind):
            raise ConfigurationError(f"simulate({name}=...) takes foedus.{kind.__name__}(...), and was given {value!r}")


_HINTS = {
    "LocalSGD": "; write foedus.fedavg(local_sgd(...))",
    "LocalTraining": "; write foedus.fedavg(local_training(...))",
    "Dataset": "; deal it out to clients first: dataset.partition(...)",
    "dict": "; write foedus.Clients.of({...})",
    "list": "; write foedus.Clients.of({'hospital a': (x, y), ...})",
}


def _check_counts(rounds: Any, seed: Any) -> None:
    check_whole("rounds", rounds, least=0)
    if not (whole(seed, least=-(2**63)) and seed < 2**63):
        raise ConfigurationError(f"seed must be a whole number of at most 64 bits, not {seed!r}")


def _train_loss(outcome: Outcome) -> float | None:
    """The mean loss of the updates that were let in, weighted by examples; None if none is known."""
    refused = {refusal.client for refusal in outcome.refused}
    rows = zip(outcome.clients, outcome.examples, outcome.losses, strict=True)
    known = [(n, loss) for client, n, loss in rows if client not in refused and math.isfinite(loss)]
    total = sum(n for n, _ in known)
    return sum(n * loss for n, loss in known) / total if total else None


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _sampler(
    cohort: int | Sampler | None, clients: Clients, settings: Settings
) -> tuple[Sampler, int | None]:
    """Who is asked, and how many answers are wanted, if that is a number."""
    if cohort is None:
        return everybody(), None
    if isinstance(cohort, Sampler):
        return cohort, None
    if not whole(cohort, least=1):
        raise ConfigurationError(
            f"cohort is a number of clients, a sampler such as foedus.poisson(0.1), or None for all; not {cohort!r}"
        )
    asked = wanted = int(cohort)
    if wanted > len(clients):
        raise ConfigurationError(
            f"a cohort of {wanted} clients does not fit into a population of {len(clients)}; "
            f"write cohort={len(clients)}, or less"
        )
    if settings.world:
        asked = min(len(clients), math.ceil(wanted * settings.world.over_selection - 1e-9))
    return uniform(asked), wanted


def _work(job: Job, asked: NDArray[np.int64]) -> NDArray[np.int64]:
    """Training examples that each client will process, [C]."""
    known = job.clients.sizes
    sizes = known[asked] if known is not None else np.array([len(job.clients.train(int(c))) for c in asked], np.int64)
    return processed(job.algorithm.client, sizes)


def _minimum(settings: Settings) -> int:
    return settings.world.minimum if settings.world else 1


def _folder(settings: Settings) -> Path:
    return new_folder() if settings.folder is None else Path(settings.folder)


def _files(evaluation: Evaluation, settings: Settings) -> list[str]:
    """Files of lines beside those that every run has."""
    asked = {CLIENTS: evaluation.clients, LOCAL: settings.local_curves is not None}
    return [name for name, wanted in asked.items() if wanted]


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    told = [
        f"{name} is {found.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if found.get(name) != value and name != "rounds"
    ]
    return "; ".join(told) or "its data, loss, first weights, evaluation or world differ"


"""The simulation engine: cohort → local training → merge → decode → server step, round after round.

Everything that a round depends on lies in :class:`~foedus.rounds.state.RunState` and in counted randomness, so a
run killed at any moment goes on from its last checkpoint and ends with the same bytes as one never killed.

Not here: how local training is carried out (the executors), what files look like (``foedus.record``).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.checks import check_whole, whole
from foedus.core.compose import Algorithm
from foedus.core.population import Clients
from foedus.core.select import Population, Positions, Sampler, everybody, uniform
from foedus.core.task import Task
from foedus.core.timing import Buffered, Hierarchical
from foedus.errors import CheckpointError, ConfigurationError, DataError, FoedusError, NoGuarantee, NothingToAggregate
from foedus.privacy.claims import fewest, seen_by_nobody
from foedus.record import RunFolder
from foedus.record.folder import CLIENTS, KEPT, LOCAL, METRICS, SCORES, TIMINGS, new_folder
from foedus.record.folder import read as read_record
from foedus.record.kept import Kept
from foedus.rounds import evaluate, identity, start
from foedus.rounds.commit import Server
from foedus.rounds.debug import DebugSession
from foedus.rounds.evaluate import Evaluation
from foedus.rounds.lines import described, round_line
from foedus.rounds.sending import Sender
from foedus.rounds.spending import Spending, counted_anyhow, example_costs, spending
from foedus.rounds.state import COSTS, RunState
from foedus.rounds.work import Job, Outcome, Session
from foedus.sim.executors import open_session
from foedus.sim.flights import AsTheyCome
from foedus.sim.local_curves import attach
from foedus.sim.masks import check_masks, check_sealed
from foedus.sim.pace import Brought, ByEdges, Ground, InStep, Pace, minimum
from foedus.sim.progress import Progress, announce, into_sinks, progress
from foedus.sim.run import Run
from foedus.sim.settings import Settings
from foedus.sim.singly import check_scored
from foedus.tree import Vector


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
    _check_test(clients)
    evaluate.check_targets(evaluation.stop_at, task.metrics, central=clients.central_test is not None)
    sampler, wanted = _sampler(cohort, clients, settings)
    _check_minimum(settings, most=wanted or len(clients))
    check_scored(algorithm, settings.watch)
    trainer = open_trainer(evaluate.checked(task), seed=seed, device=settings.device)
    job = Job(task, algorithm, clients, seed, settings.device)
    averaged = task.average_buffers and trainer.buffer_layout.size > 0
    _check_budget(settings)
    check_sealed(algorithm, population=len(clients), wanted=wanted, buffers=averaged)
    check_masks(algorithm, settings, wanted=_asked(wanted, settings, clients), buffers=averaged)
    private = spending(algorithm, sampler, settings.budget, buffers=averaged)
    plan = _Plan(job, trainer, sampler, wanted, rounds, evaluation, settings, private)
    folder = RunFolder(_folder(settings), more=_files(evaluation, settings))
    try:
        return _Engine(plan, folder).run()
    finally:
        folder.close()
        folder.tidy()


# What tells that a folder is one of several runs.
STUDIES = {"federated/run.json": "comparison", "comparison.txt": "comparison", "sweep.txt": "sweep"}
ALONE = 10  # updates that came one by one and were refused, in a row, after which a run gives up


class _Plan(NamedTuple):
    """All that was asked for."""

    job: Job
    trainer: Trainer
    sampler: Sampler
    wanted: int | None  # clients a round, where that is a number; a world may ask more of them
    rounds: int
    evaluation: Evaluation
    settings: Settings
    spending: Spending | None = None

    def identity(self, pieces: Mapping[str, str]) -> str:
        """A digest of all that a resumed run must share with the interrupted one; the number of rounds may grow."""
        job, world = self.job, self.settings.world
        parts = (
            job.algorithm.label, job.seed, self.sampler.label,
            self.trainer.layout.digest(), self.trainer.buffer_layout.digest(), self.trainer.backend,
            [m.name for m in job.task.metrics], job.task.average_buffers, world and world.label, dict(pieces),
        )  # fmt: skip
        hostile = self.settings.adversary
        told = parts if hostile is None else (*parts, hostile.label, hostile.clients, hostile.since)
        told = told if self.settings.watch is None else (*told, self.settings.watch.label)
        told = told if self.spending is None else (*told, self.spending.event)  # the budget itself may be raised
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def pieces(self) -> dict[str, str]:
        """Digests of what is written as code."""
        job, asked = self.job, self.evaluation
        written = identity.pieces(job.task, job.algorithm.client, self.sampler, trainer=self.trainer)
        return written | {
            "world": identity.digest(self.settings.world),
            "data": job.clients.fingerprint(),
            "first weights": start.describe(self.settings.start),
            "evaluation": f"every {asked.every}{', clients' * asked.clients}",
        }

    def describe(self) -> dict[str, Any]:
        job = self.job
        layouts = self.trainer.layout.size, self.trainer.buffer_layout.size
        told = described(
            job, cohort=self.sampler.label, rounds=self.rounds, layouts=layouts, backend=self.trainer.backend
        )  # fmt: skip
        return told | {
            "device": self.trainer.device,
            **{
                name: value.label
                for name, value in (
                    ("adversary", self.settings.adversary),
                    ("watch", self.settings.watch),
                    ("budget", self.settings.budget),
                )
                if value is not None
            },
        }


class _Engine:
    """One run: owns the folder, the state and the executor's session."""

    def __init__(self, plan: _Plan, folder: RunFolder) -> None:
        self.plan, self.folder = plan, folder
        self.pieces = plan.pieces()  # once: they look at all the data
        self.identity = plan.identity(self.pieces)
        self.server = Server(plan.job, plan.trainer.layout, plan.trainer.buffer_layout)
        self.kept = Kept(folder.path / KEPT)
        self.state, self.executor_name = self._restored()
        self.kept.go_back(self.state.round)
        ground = Ground(
            plan.job, self.server, plan.settings, plan.sampler, plan.wanted, plan.rounds, self.kept, Sender(self.server)
        )
        self.ground, self.pace = ground, _pace(ground)
        self._saved_at = time.monotonic()
        self._whole = True  # whether state and metrics.jsonl are those of the same round

    # --- beginning and end

    def _restored(self) -> tuple[RunState, str | None]:
        found = self.folder.configuration()
        if found is None:
            return self._fresh(), None
        if found.get("identity") != self.identity and self.folder.holds_nothing():
            self.folder.restore()  # empties what a failed run left
            return self._fresh(), None
        if not self.plan.settings.resume:
            raise ConfigurationError(
                f"{self.folder.path} holds a run already. Choose another folder, or let it go on: Settings(resume=True)"
            )
        if found.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.folder.path} holds another run: {self._difference(found)}. "
                "Choose another folder, or delete this one"
            )
        saved = self.folder.restore()
        if saved is None:
            return self._fresh(), found.get("executor")
        state = RunState.restored(saved, len(self.plan.job.clients), self.plan.job.algorithm.sides)
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

    def _difference(self, found: Mapping[str, Any]) -> str:
        told = {"pieces": self.pieces, "foedus": start.versions()}
        return identity.difference(found, self.plan.describe() | told)

    def _fresh(self) -> RunState:
        return self.server.first(start.weights(self.plan.settings.start, self.plan.trainer))

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
        if self.plan.spending is not None and self.state.stopped is None and self.state.round < self.plan.rounds:
            self.state.stopped = self.plan.spending.stop(self.state)
        if self.state.stopped is None and len(self.state.spent) == len(self.plan.job.clients):
            self.state.stopped = "no client may train once more: what single examples may cost is spent"
        return self.state.round >= self.plan.rounds or self.state.stopped is not None

    def _session(self, shown: Progress) -> Session:
        settings = self.plan.settings
        if settings.local_curves is not None:
            return attach(settings.local_curves, self.plan.job, self.plan.trainer, self.folder)
        probe = self.ground.cohort(self.state.round + 1)
        orders = self.ground.orders(self.state.round + 1, self.state, probe)
        left = self.plan.rounds - self.state.round
        return open_session(
            settings.executor, self.plan.job, orders, rounds=left, again=self.executor_name, say=shown.say
        )

    def _configure(self, executor: str | None, status: str) -> None:
        values = self.plan.describe() | {
            "identity": self.identity,
            "pieces": self.pieces,
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
        costs, private = self.state.costs, example_costs(self.plan.job, self.state, self.kept.read)
        self.folder.save_costs(
            {"client": ids[c], **dict(zip(COSTS, costs[c].tolist(), strict=True)), **private.get(c, {})}
            for c in self.state.paid().tolist()
        )
        self._configure(executor, "finished")

    def _farewell(self) -> str:
        why = f" ({self.state.stopped})" if self.state.stopped else ""
        done = "1 round" if self.state.round == 1 else f"{self.state.round} rounds"
        return f"{done} done{why}; everything is in {self.folder.path}"

    def _result(self) -> Run:
        self.folder.flush()
        return Run(read_record(self.folder.path), self.state.weights, self.plan.trainer)

    # --- a round

    def _round(self, session: Session, shown: Progress) -> None:
        clock = _Clock()
        state, plan = self.state, self.plan
        number = state.round + 1
        self._whole = plan.settings.local_curves is None  # its lines are written while the round is under way
        brought = self.pace.round(number, session, state)
        clock.lap("train")
        self._whole = False
        self._step(brought, number)
        clock.lap("aggregate")
        line = self._line(brought)
        line |= self._evaluation(number)
        clock.lap("evaluate")
        self.folder.append(METRICS, line)
        self.folder.append(TIMINGS, clock.line(number))
        self._whole = True
        if time.monotonic() - self._saved_at >= plan.settings.checkpoint_seconds:
            self._save(session)
        shown.advance(line, clock.total())

    def _step(self, brought: Brought, number: int) -> None:
        """Decode the merged messages and let the server take its step."""
        outcome, before = brought.outcome, self.state.weights
        unseen = seen_by_nobody(self.plan.job.algorithm.aggregator)
        if not unseen:  # that nobody was let in may be as much of a secret as who took part
            self._check_let_in(outcome, number)
        if brought.timing is not None:
            self.state.timing = brought.timing
        if sent := [n for n in outcome.sent if n]:
            self.state.sent = round(sum(sent) / len(sent))
        enough = brought.enough and outcome.senders >= fewest(self.plan.job.algorithm.aggregator)
        if (outcome.clients or unseen) and enough:
            if self.plan.spending is not None:
                self.plan.spending.charge(self.state, number)
            self.server.commit(self.state, outcome, number, pull=brought.pull)
            self.kept.write(number, outcome.kept)
        else:  # what clients keep otherwise holds only if they count
            self.kept.write(number, counted_anyhow(outcome.kept, self.kept.read(outcome.kept)))
        self.state.round = number
        self._part_with(outcome)
        if self.plan.settings.watch is not None:
            self._score(outcome, before)

    def _part_with(self, outcome: Outcome) -> None:
        """Remember who trains no more."""
        if outcome.spent:
            self.state.spent = np.union1d(self.state.spent, sorted(outcome.spent)).astype(np.int64)

    def _score(self, outcome: Outcome, before: Weights) -> None:
        """Score every update of the round, and write it down."""
        ids, out = self.plan.job.clients.ids, outcome.out
        found = self.ground.singly.scored(outcome, before, self.state, self.plan.trainer)
        for client, figures in found.items():
            line = {"round": self.state.round, "client": ids[client], "refused": client in out}
            self.folder.append(SCORES, line | figures._asdict())

    def _check_let_in(self, outcome: Outcome, number: int) -> None:
        """Give up when nothing is let in any more: a whole cohort at once, or as many single updates in a row."""
        trained, refused = set(outcome.clients), outcome.out
        if not trained or trained - refused:
            self.state.barren = 0 if trained else self.state.barren
            return
        self.state.barren += len(trained)
        alone = self.plan.job.algorithm.timing is not None or len(trained) == 1
        if not alone or self.state.barren >= min(ALONE, len(self.plan.job.clients)):
            raise self._nothing(outcome, number)

    def _name(self, position: int) -> str:
        """Who it is, in a message: a client, or an edge aggregator, whose numbers come after the clients'."""
        ids = self.plan.job.clients.ids
        return f"client {ids[position]!r}" if position < len(ids) else f"edge {position - len(ids)}"

    def _nothing(self, outcome: Outcome, number: int) -> NothingToAggregate:
        told = "; ".join(f"{self._name(r.client)}: {r.reason}" for r in outcome.refused[:3])
        since = f", and {self.state.barren} in a row" if self.state.barren > len(set(outcome.clients)) else ""
        return NothingToAggregate(
            f"round {number}: every one of the {len(set(outcome.clients))} updates was refused{since} ({told}). "
            "If they are not finite, the model has diverged or the data holds NaN: try a smaller learning rate, "
            "clip_norm in local_sgd(), or look at one client with executor=foedus.executors.debug()",
            round=number,
        )

    def _line(self, brought: Brought) -> dict[str, Any]:
        """The round's line in metrics.jsonl."""
        outcome, costs = brought.outcome, brought.costs
        self.state.costs[brought.asked] += costs
        line = round_line(
            self.plan.job, self.state, outcome, costs, spending=self.plan.spending, told=brought.told
        )  # fmt: skip
        if brought.world is not None:
            self.state.simulated_seconds += brought.world["seconds"]
            line["simulated"] = brought.world | {
                "elapsed_seconds": self.state.simulated_seconds,
                "compute_seconds": float(costs[:, 3].sum()),
                "energy_joules": float(costs[:, 4].sum()),
            }
        return line

    def _evaluation(self, number: int) -> dict[str, Any]:
        plan, asked = self.plan, self.plan.evaluation
        if not asked.every or (number % asked.every and number != plan.rounds):
            return {}
        found = evaluate.evaluate(plan.job, plan.trainer, self.state, self._models if asked.clients else None)
        for client, (examples, figures, personal) in found.clients.items():
            mine = {} if personal is None else {"personal": personal}
            self.folder.append(CLIENTS, {"round": number, "client": client, "examples": examples} | figures | mine)
        central = found.figures.get("central", {})
        self.state.stopped = self.state.stopped or evaluate.reached(central, asked.stop_at, plan.job.task.metrics)
        return found.figures

    def _models(self, position: int) -> tuple[Vector, Weights | None]:
        """What a client has for itself: buffers beside the global model, and its own model, if there is one."""
        orders = self.ground.orders(self.state.round, self.state, np.array([position]))
        if self.plan.job.algorithm.method is None or self.plan.job.algorithm.method.personal is None:
            return orders.buffers(position), None
        return orders.buffers(position), DebugSession(self.plan.job, self.plan.trainer).personal(orders)

    def _save(self, session: Session) -> None:
        self.kept.commit()
        self.folder.checkpoint(self.state.checkpoint(self.identity, session.name))
        self.kept.settle(self.state.round)
        self._saved_at = time.monotonic()


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
    if clients.later is not None:
        return  # data may come later
    if clients.sizes is not None and not clients.sizes.any():
        raise DataError(f"none of the {len(clients)} clients has a single training example")


def _check_test(clients: Clients) -> None:
    if clients.central_test is not None and not len(clients.central_test):
        raise DataError(
            "the central test set is empty, so there is nothing to evaluate on. Give examples, "
            "clients.with_test((x, y)), or none, clients.with_test(None)"
        )


def _check_budget(settings: Settings) -> None:
    """Refuse settings under which a budget would cover less than it says.

    Raises:
        NoGuarantee: says which, and what to leave out.
    """
    if settings.budget is None:
        return
    if settings.watch is not None:
        raise NoGuarantee(
            "Settings(watch=...) keeps clients out by what they and others sent, which says something about them. "
            "Leave out the watch, or the budget"
        )
    if settings.budget.hidden and settings.world is not None:
        raise NoGuarantee(
            "in a simulated world who is quick and at hand takes part, so that sampling cannot be counted. Leave out "
            "world=..., or hidden=True"
        )


def _check_minimum(settings: Settings, *, most: int) -> None:
    """Refuse a world in which no round can ever count."""
    if minimum(settings) > most:
        raise ConfigurationError(
            f"World(minimum={minimum(settings)}): no round can have so many answers, since at most {most} clients are "
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


def _sampler(cohort: int | Sampler | None, clients: Clients, settings: Settings) -> tuple[Sampler, int | None]:
    """Who is asked, and how many answers are wanted, if that is a number."""
    if cohort is None:
        return everybody(), None
    if isinstance(cohort, Sampler):
        return _located(cohort), None
    if not whole(cohort, least=1):
        raise ConfigurationError(
            f"cohort is a number of clients, a sampler such as foedus.poisson(0.1), or None for all; not {cohort!r}"
        )
    wanted = int(cohort)
    if wanted > len(clients):
        raise ConfigurationError(
            f"a cohort of {wanted} clients does not fit into a population of {len(clients)}; "
            f"write cohort={len(clients)}, or less"
        )
    return uniform(_asked(wanted, settings, clients) or wanted), wanted


def _asked(wanted: int | None, settings: Settings, clients: Clients) -> int | None:
    """How many clients are asked in a round, where that is a number."""
    if wanted is None:
        return None
    more = settings.world.over_selection if settings.world else 1.0
    return min(len(clients), math.ceil(wanted * more - 1e-9))


def _located(sampler: Sampler) -> Sampler:
    """A sampler whose own errors say in which round they happened."""

    def sample(population: Population, seed: int, round: int) -> Positions:
        try:
            return sampler.sample(population, seed, round)
        except FoedusError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"the sampler {sampler.label} failed in round {round}: {type(error).__name__}: {error}"
            ) from error

    return sampler._replace(sample=sample)


def _pace(ground: Ground) -> Pace:
    """The pace of an algorithm's rounds."""
    timing = ground.job.algorithm.timing
    if timing is not None and ground.settings.watch is not None:
        raise ConfigurationError(
            f"Settings(watch=...) scores the updates of a round beside each other, and {timing.label} takes them at "
            "other times or places. Leave out the watch, or the timing"
        )
    match timing:
        case Buffered() as timing:
            return AsTheyCome(ground, timing)
        case Hierarchical() as timing:
            return ByEdges(ground, timing)
        case _:
            return InStep(ground)


def _folder(settings: Settings) -> Path:
    if settings.folder is None:
        return new_folder()
    folder = Path(settings.folder)
    if kind := next((kind for name, kind in STUDIES.items() if (folder / name).exists()), None):
        raise ConfigurationError(
            f"{folder} holds a {kind}, with a folder for each of its runs. Choose another folder for this run"
        )
    return folder


def _files(evaluation: Evaluation, settings: Settings) -> list[str]:
    """Files of lines beside those that every run has."""
    asked = {
        CLIENTS: evaluation.clients, LOCAL: settings.local_curves is not None, SCORES: settings.watch is not None
    }  # fmt: skip
    return [name for name, wanted in asked.items() if wanted]

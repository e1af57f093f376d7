"""The compiled executor: a whole cohort's local training as one XLA program (``backends/compiled.py``).

A torch model is traced to a jax function once per batch width and compared with eager torch on real examples; a
jax model brings its own step. XLA clamps an index that is out of range where torch raises, so label ranges are
checked here, by showing the user's own loss the least and the greatest label there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, open_trainer
from foedus.backends.cohort import UNGUIDED
from foedus.core.batches import Plan, alike, plan, uniform_widths
from foedus.core.client import LocalSGD, rule
from foedus.core.examples import Examples
from foedus.core.method import Trained
from foedus.core.parts import Rows, offsets_of
from foedus.core.task import JaxModel, NumpyModel
from foedus.errors import ConfigurationError, FoedusError, MissingExtra, TrainingError, UnsupportedOperator
from foedus.rounds.collect import Collector, Gained
from foedus.rounds.debug import DebugSession
from foedus.rounds.visits import Group, answered, contributions, layouts_of, phase, visit
from foedus.rounds.work import Job, Orders, Outcome, Session, union
from foedus.sim.reading import Reading

PROGRAMS = 32  # that are kept ready at most
WIDTHS = 16  # of batches, at most, where they must not be padded
SHOWN = 8  # clients whose first step is taken plainly, to explain why a model cannot be compiled
COLUMNS = (attrgetter("updates"), attrgetter("buffers"), attrgetter("losses"))


@dataclass(frozen=True)
class Compiled:
    """See :func:`foedus.executors.compiled`."""

    name: str = "compiled"

    def open(self, job: Job) -> CompiledSession:
        if not isinstance(job.algorithm.client, LocalSGD):
            raise ConfigurationError("compiled runs local_sgd(); a training loop or optimiser of your own needs debug")
        if isinstance(job.task.model, NumpyModel):
            raise ConfigurationError("compiled runs torch and jax models; a NumpyModel brings no graph to compile")
        devices = compiled().devices(job.device)
        trainer = open_trainer(job.task, seed=job.seed, device="cpu" if isinstance(job.task.model, JaxModel) else None)
        return CompiledSession(job, trainer, devices)


class Gathered(NamedTuple):
    """The data of a cohort: ``rows`` int64 [sum of sizes] of ``examples``, client after client; ``sizes`` [C]."""

    orders: Orders
    examples: Examples
    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def only(self, slots: NDArray[np.int64]) -> Gathered:
        """The data of some of the clients."""
        own = Rows(self.rows, offsets_of(self.sizes)).choose(slots)
        return Gathered(self.orders.only(slots), self.examples, own.values, own.sizes)


class CompiledSession(Session):
    """Holds one program per batch width, and the pool of examples where there is one."""

    name = "compiled"

    def __init__(self, job: Job, trainer: Trainer, devices: Sequence[Any]) -> None:
        self._job, self._trainer, self._devices = job, trainer, devices
        self._lowered: dict[int, tuple[Any, str | None]] = {}  # by width of batches: recipe, why it takes no padding
        self._programs: OrderedDict[Any, Any] = OrderedDict()  # by width of batches, and by the rule of steps
        self._settled: set[Any] = set()  # ways to cut examples into batches that are known to need no padding
        self._held: Any = None
        self._seen: dict[int, tuple[int, int]] = {}  # the range of labels and tokens shown to the model
        self._safe: set[int] = set()  # arrays all of whose range has been shown
        self._recipe = _recipes(job, trainer)
        self._threads = ThreadPoolExecutor(len(devices))
        self._reading = None if job.clients.pool else Reading(threads=len(devices))

    def run(self, orders: Orders) -> Outcome:
        job, spec = self._job, self._job.algorithm.client
        assert isinstance(spec, LocalSGD)
        gathered = self._gathered(orders)
        if gathered is None:
            return Outcome()
        self._check_range(gathered)
        parts = alike(spec, gathered.sizes, limit=orders.limit)
        return union(job, [self._part(gathered.only(slots) if len(parts) > 1 else gathered) for slots in parts])

    def _part(self, gathered: Gathered) -> Outcome:
        """The clients that one plan holds."""
        if self._job.algorithm.method is not None:
            return self._visited(gathered)
        results, steps = self._together(gathered, None)
        return self._collected(gathered.orders, results, sizes=gathered.sizes, steps=steps)

    def _together(self, gathered: Gathered, group: Group | None) -> tuple[Any, NDArray[np.int32]]:
        """One training of a cohort, or of a group of its members, and how many steps each made."""
        orders, sizes = gathered.orders, gathered.sizes
        spec = self._job.algorithm.client if group is None else group.spec
        if not isinstance(spec, LocalSGD):
            raise ConfigurationError(
                "compiled runs local_sgd(); a method's local_training() needs the executors debug, processes or ray"
            )
        group = group or Group(np.arange(len(sizes)), spec, 0, UNGUIDED, _kept(orders))  # type: ignore[arg-type]
        parts = self._cut(spec, gathered, group.members)
        if len(parts) == 1:
            return self._at_once(gathered, group)
        found = [self._at_once(gathered, _among(group, slots)) for slots in parts]
        back = np.argsort(np.concatenate(parts))
        which = COLUMNS if group.guides.momenta is None else (*COLUMNS, attrgetter("momenta"))
        columns = [[row for results, _ in found for row in column(results)] for column in which]
        updates, buffers, losses, *momenta = ([column[i] for i in back] for column in columns)
        steps = np.concatenate([steps for _, steps in found])[back]
        return compiled().Results(updates, buffers, np.array(losses), *momenta), steps

    def _cut(self, spec: LocalSGD, gathered: Gathered, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Slots of the members in parts that one plan holds: of one width where batches must not be padded."""
        sizes = gathered.sizes[members]
        if self._unpaddable(spec, gathered) is None:
            return alike(spec, sizes, limit=gathered.orders.most(members))
        self._demand_even_batches(spec, gathered)
        widths = uniform_widths(spec, sizes)
        return [np.flatnonzero(widths == width) for width in np.unique(widths)]

    def _at_once(self, gathered: Gathered, group: Group) -> tuple[Any, NDArray[np.int32]]:
        """One training of clients whose batches are in one plan."""
        orders, examples, rows, sizes = gathered
        spec, members = group.spec, group.members
        assert isinstance(spec, LocalSGD)
        own = plan(
            spec, sizes[members], orders.cohort[members], seed=self._job.seed, round=orders.round,
            limit=orders.most(members), phase=phase(orders, group.phase),
        )  # fmt: skip
        made = compiled().pooled(own, rows, (np.cumsum(sizes) - sizes)[members])
        if self._unpaddable(spec, gathered) is None:
            made = widened(made)
        program = self._program(made.rows.shape[1], gathered, spec)
        held = self._hold(program, examples)
        rate = spec.rate(orders.round)
        results = program.run(orders.start, held, made, lr=rate, kept=group.buffers, guides=group.guides)
        return results, made.steps

    def _visited(self, gathered: Gathered) -> Outcome:
        """A cohort whose clients follow a method of their own."""
        job, trainer, (orders, _, _, sizes) = self._job, self._trainer, gathered

        def train(group: Group) -> list[Trained]:
            results, steps = self._together(gathered, group)
            begun = group.guides.start
            vectors = [u + (orders.start.vector if begun is None else begun[i]) for i, u in enumerate(results.updates)]
            after = [before + change for before, change in zip(group.buffers, results.buffers, strict=True)]
            momenta = results.momenta or [None] * len(vectors)
            rows = zip(vectors, after, steps.tolist(), results.losses.tolist(), momenta, strict=True)
            return [Trained(*row) for row in rows]

        seen = [visit(job, orders, i, examples=int(n), layouts=layouts_of(trainer)) for i, n in enumerate(sizes)]
        found = contributions(job, seen, train, partial(answered, job, trainer, orders))
        collector = Collector(job, orders, layouts_of(trainer))
        for slot, (size, brought) in enumerate(zip(sizes.tolist(), found, strict=True)):
            collector.contribute(slot, brought, size)
        return collector.outcome

    def _gathered(self, orders: Orders) -> Gathered | None:
        """The data of the clients that have any; ``None`` if nobody has (no step, no weight)."""
        clients = self._job.clients.at(orders.round)
        if clients.pool is not None:
            examples, rows = clients.pool
            flat, sizes = (own := rows.choose(orders.cohort)).values, own.sizes
            busy = np.flatnonzero(sizes)
            return Gathered(orders.only(busy), examples, flat, sizes[busy]) if len(busy) else None
        assert self._reading is not None
        parts = self._reading.take(orders.cohort, clients)
        if orders.following is not None:
            self._reading.begin(orders.following, self._job.clients.at(orders.round + 1))
        sizes = np.array([len(p) for p in parts], np.int64)
        busy = np.flatnonzero(sizes)
        if not len(busy):
            return None
        examples = compiled().stacked([parts[i] for i in busy])[0]
        return Gathered(orders.only(busy), examples, np.arange(int(sizes.sum())), sizes[busy])

    def _hold(self, program: Any, examples: Examples) -> Any:
        """The examples where the devices see them; a resident pool stays there."""
        if self._job.clients.pool is None:
            return program.hold(examples)
        if self._held is None:
            self._held = program.hold(examples)
        return self._held

    def _recipe_of(self, width: int, gathered: Gathered) -> tuple[Any, str | None]:
        if width not in self._lowered:
            try:
                self._lowered[width] = self._recipe(width=width, examples=gathered.examples)
            except FoedusError:
                raise
            except Exception as error:
                raise self._explained(error, gathered.orders) from error
        return self._lowered[width]

    def _explained(self, error: Exception, orders: Orders) -> FoedusError:
        """What plain training says of a model or loss that could not be tried out: whose data, and which step."""
        few = replace(orders.only(np.arange(min(len(orders.cohort), SHOWN))), limit=1, limits=None, following=None)
        try:
            DebugSession(self._job, self._trainer).run(few)
        except FoedusError as found:
            return found
        return UnsupportedOperator(f"this model or loss, which could not be compiled ({type(error).__name__}: {error})")

    def _unpaddable(self, spec: LocalSGD, gathered: Gathered) -> str | None:
        """Why batches may not be padded; ``None`` if they may. It is a property of model and loss."""
        if self._lowered:
            return next(iter(self._lowered.values()))[1]
        widest = int(gathered.sizes.max())
        return self._recipe_of(compiled().roomy(min(spec.batch_size or widest, widest)), gathered)[1]

    def _program(self, width: int, gathered: Gathered, spec: LocalSGD) -> Any:
        which = (width, rule(spec))
        if which not in self._programs:
            recipe, _ = self._recipe_of(width, gathered)
            self._programs[which] = compiled().CohortProgram(replace(recipe, spec=spec), self._devices)
            if len(self._programs) > PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(which)
        return self._programs[which]

    def _demand_even_batches(self, spec: LocalSGD, gathered: Gathered) -> None:
        """Refuse, at the first use of a spec, clients whose batches are not all of one width: now or ever."""
        which = (spec.batch_size, spec.steps)
        if which in self._settled:
            return
        reason, clients = self._unpaddable(spec, gathered), self._job.clients
        told = f"compiled cannot pad batches here: {reason}; and "
        other = "or use the executor vectorised, which trains every batch in its own shape"
        if clients.later is not None or clients.sizes is None:
            what = "changes from round to round" if clients.later is not None else "is not known beforehand"
            hint = "" if clients.later is not None else "Give Clients.generated(..., sizes=[...]), "
            raise ConfigurationError(f"{told}how many examples clients have {what}. {hint}{other}")
        sizes = clients.at(gathered.orders.round).sizes
        assert sizes is not None
        widths = uniform_widths(spec, sizes)
        if len(uneven := np.flatnonzero((sizes > 0) & (widths == 0))):
            first = int(uneven[0])
            raise ConfigurationError(
                f"{told}with {spec.label} the last batch of client {clients.ids[first]!r} is smaller than its others "
                f"({sizes[first]} examples in batches of {spec.batch_size}). Give a batch_size that divides clients' "
                f"numbers of examples, {other}"
            )
        if (number := len(np.unique(widths[sizes > 0]))) > WIDTHS:
            raise ConfigurationError(
                f"{told}with {spec.label} clients' batches have {number} different widths, each of which needs a "
                f"program of its own (at most {WIDTHS}). Give a batch_size that divides clients' numbers of "
                f"examples, {other}"
            )
        self._settled.add(which)

    def _check_range(self, gathered: Gathered) -> None:
        """Show the model the greatest and least labels and tokens, if they go beyond those it has seen."""
        orders, examples, rows, sizes = gathered
        for at, array in enumerate((*examples.inputs, examples.targets)):
            if array.dtype.kind not in "iu" or at in self._safe:
                continue
            values = array[rows].reshape(len(rows), -1)
            least, most = self._seen.get(at, (0, -1))
            low, high = int(values.min(initial=0)), int(values.max(initial=0))
            if low < least or high > most:
                for row in (values.min(1).argmin(), values.max(1).argmax()):
                    owner = int(np.searchsorted(np.cumsum(sizes), row, side="right"))
                    self._show(orders, examples.take(rows[[row]]), client=int(orders.cohort[owner]))
                self._seen[at] = (min(low, least), max(high, most))
            if self._job.clients.pool is not None and self._seen[at] == (
                min(0, array.min()),
                max(0, array.max()),
            ):
                self._safe.add(at)  # there is nothing beyond that in the pool: no need to look again

    def _show(self, orders: Orders, batch: Examples, *, client: int) -> None:
        try:
            self._trainer.evaluate(orders.start, batch)
        except Exception as error:
            name = self._job.clients.ids[client]
            raise TrainingError(
                f"local training would fail for client {name!r} in round {orders.round}: {type(error).__name__}: "
                f"{error}; labels from {batch.targets.min()} to {batch.targets.max()}. "
                "The batch is on this exception as .batch",
                client=name, round=orders.round, batch=(list(batch.inputs), batch.targets),
            ) from error  # fmt: skip

    def _collected(
        self, orders: Orders, results: Any, *, sizes: NDArray[np.int64], steps: NDArray[np.int32]
    ) -> Outcome:
        """Updates encoded and merged, the cohort shared out over threads."""
        layouts = (self._trainer.layout, self._trainer.buffer_layout)

        def part(slots: NDArray[np.int64]) -> Outcome:
            collector = Collector(self._job, orders, layouts)
            own = (results.updates, results.buffers, sizes, steps, results.losses)
            collector.add_all(slots.tolist(), Gained(*([column[slot] for slot in slots] for column in own)))
            return collector.outcome

        cut = np.array_split(np.arange(len(orders.cohort)), len(self._devices))
        return union(self._job, self._threads.map(part, cut))

    def close(self) -> None:
        self._threads.shutdown()
        if self._reading is not None:
            self._reading.close()
        self._programs.clear()
        self._held = None


def _among(group: Group, slots: NDArray[np.int64]) -> Group:
    """Some of a group's members."""
    buffers = None if group.buffers is None else group.buffers[slots]
    return group._replace(members=group.members[slots], guides=group.guides.of(slots), buffers=buffers)


def compiled() -> Any:
    """The module that knows jax, imported when it is needed."""
    try:
        from foedus.backends import compiled as module
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "jax", "jax", "the compiled executor") from error
    return module


def widened(made: Plan) -> Plan:
    """The plan with its batches padded to one of few widths, so that few programs are compiled."""
    room = compiled().roomy(made.rows.shape[1]) - made.rows.shape[1]
    return made._replace(rows=np.pad(made.rows, ((0, 0), (0, room)), mode="edge")) if room else made


def _kept(orders: Orders) -> NDArray[Any] | None:
    if not orders.kept:
        return None
    return np.stack([orders.buffers(int(c)) for c in orders.cohort])


def _recipes(job: Job, trainer: Any) -> Callable[..., tuple[Any, str | None]]:
    """The function ``(width=, examples=) -> (recipe, why batches may not be padded)``."""
    spec = job.algorithm.client
    assert isinstance(spec, LocalSGD)
    if isinstance(job.task.model, JaxModel):
        from foedus.backends.jax_backend import recipe as of_jax

        return partial(of_jax, trainer, job.task, spec)
    from foedus.backends.torch_compiled import recipe as of_torch

    return partial(of_torch, trainer, job.task, spec)

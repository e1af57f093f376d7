"""The vectorised executor: the clients of a cohort trained in one batched computation.

The cohort is sorted by size and cut into blocks; the clients of a block take their steps together
(``core/packing.py``). A block has as many clients as fit into the processor's cache, or into the memory of a
GPU, so that how work is cut depends on the job and the cohort only, never on the number of processors. On a
CPU the blocks are computed side by side, each by one thread.

Carries out ``local_sgd()``; a training loop of the user's own runs in ``debug``, ``processes`` and ``ray``.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Assignment, Trainer, Weights, open_trainer
from foedus.backends.cohort import UNGUIDED, Block, Cohort, Stacked, open_cohort
from foedus.backends.cores import cores
from foedus.core.batches import Plan, alike, plan
from foedus.core.checks import check_whole
from foedus.core.client import Client, LocalSGD, rule
from foedus.core.method import Consult, Measure, Trained
from foedus.core.packing import PADDING, blocks, calls
from foedus.core.population import Clients, Examples
from foedus.errors import ConfigurationError, FoedusError, TrainingError, UnsupportedOperator
from foedus.rounds.collect import Collector, Gained
from foedus.rounds.debug import DebugSession
from foedus.rounds.visits import Group, answered, contributions, phase, visit
from foedus.rounds.work import Job, Orders, Outcome, Session, changed, read, union

FEW, MANY = 4, 8  # blocks of a cohort: so many if they fit into the cache, else so many
OTHERS = 16  # ways to train beside the algorithm's that are kept ready, per thread
PROBE = 8  # examples that a model is tried out on
SEARCHED = 1000  # clients that are read, at most, to find one that has examples
TRIED = 0.01  # the least learning rate that a model is tried out with
AGREEMENT = 1e-3  # relative, of one step of the probe, in float32

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Vectorised:
    """See :func:`foedus.executors.vectorised`."""

    threads: int | None = None
    name: str = "vectorised"

    def open(self, job: Job) -> VectorisedSession:
        if not isinstance(job.algorithm.client, LocalSGD):
            raise ConfigurationError(
                "the vectorised executor carries out local_sgd(); local_training() runs in the executors debug, "
                "processes and ray"
            )
        if self.threads is not None:
            check_whole("vectorised(threads=...)", self.threads, also=", or None for one per core")
        trainer = open_trainer(job.task, seed=job.seed, device=job.device)
        return VectorisedSession(job, trainer, self.threads or cores())


class _Part(NamedTuple):
    """A block's clients with examples: their slots in the cohort, their sizes, and where the examples are."""

    slots: Slots
    sizes: Slots
    examples: Examples | None  # None: in the resident pool


class VectorisedSession(Session):
    """Trains blocks of clients, several side by side on a CPU."""

    name = "vectorised"

    def __init__(self, job: Job, trainer: Trainer, threads: int) -> None:
        self._job, self._trainer = job, trainer
        self._cohort = _tried_out(job, trainer)
        on_cpu = trainer.device == "cpu"
        self._threads = threads if on_cpu else 1
        self._measuring = Lock()  # the trainer is one for all threads
        self._others: OrderedDict[Any, tuple[Client, Cohort]] = OrderedDict()  # by how a method's own specs train
        self._workers = ThreadPoolExecutor(self._threads, "vectorised")
        self._free: SimpleQueue[Cohort] = SimpleQueue()
        for i in range(self._threads):
            self._free.put(self._cohort.copy() if i else self._cohort)
        pool = job.clients.pool
        self._pool = None if pool is None else self._cohort.resident(pool[0])

    def run(self, orders: Orders) -> Outcome:
        pending: deque[Future[Outcome]] = deque()
        done: list[Outcome] = []
        try:
            with self._cohort.settings():
                for part in self._parts(orders):
                    if len(pending) > self._threads:  # the data of few blocks is held at a time
                        done.append(pending.popleft().result())
                    pending.append(self._workers.submit(self._train, orders, part))
                done += [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()
        return union(self._job, done)

    def close(self) -> None:
        self._workers.shutdown(cancel_futures=True)

    # --- cutting a cohort into blocks

    def _parts(self, orders: Orders) -> Iterator[_Part]:
        """The blocks of a cohort. Where sizes are not known beforehand, blocks follow the cohort's order."""
        clients, cohort = self._job.clients.at(orders.round), orders.cohort
        sizes = clients.sizes
        if sizes is None:
            count, most = self._cut(len(cohort))
            number = max(count, -(-len(cohort) // most))
            cut = [s for s in np.array_split(np.arange(len(cohort)), number) if len(s)]
        else:
            there = np.flatnonzero(sizes[cohort])
            count, most = self._cut(len(there))
            cut = [there[b] for b in blocks(sizes[cohort[there]], count, most=most)]
        spec = self._job.algorithm.client
        for slots in cut:
            if clients.pool is None:
                yield from _gathered(spec, clients, cohort, slots)
            else:
                assert sizes is not None
                own = sizes[cohort[slots]]
                yield from (_Part(slots[part], own[part], None) for part in alike(spec, own))

    def _cut(self, clients: int) -> tuple[int, int]:
        """How many blocks, and how many clients in each at most."""
        own = self._cohort
        most = max(1, own.memory // own.size)
        if own.device != "cpu":
            return 1, most
        return (FEW if clients * own.size <= FEW * own.cache else MANY), most

    # --- training a block

    def _train(self, orders: Orders, part: _Part) -> Outcome:
        cohort = self._free.get()
        try:
            return self._block(cohort, orders, part)
        except FoedusError:
            raise
        except Exception as error:
            raise self._explained(error, orders, part) from error
        finally:
            self._free.put(cohort)

    def _block(self, cohort: Cohort, orders: Orders, part: _Part) -> Outcome:
        job, spec = self._job, self._job.algorithm.client
        layouts = (cohort.layout, cohort.buffer_layout)
        collector = Collector(job, orders, layouts)
        pool = self._pool if part.examples is None else cohort.resident(part.examples)
        if job.algorithm.method is None:
            before = np.stack([orders.buffers(int(p)) for p in orders.cohort[part.slots]])
            everyone = Group(np.arange(len(part.slots)), spec, 0, UNGUIDED, before)
            after, steps = self._together(cohort, orders, part, (pool, everyone))
            updates, changes = after.vectors - orders.start.vector, changed(after.buffers, before)
            collector.add_all(part.slots.tolist(), Gained(updates, changes, part.sizes, steps, after.losses))
            return collector.outcome

        def train(group: Group) -> list[Trained]:
            own = self._cohort_of(cohort, group.spec)
            after, steps = self._together(own, orders, part, (pool, group))
            momenta = [None] * len(steps) if after.momenta is None else list(after.momenta)
            rows = zip(after.vectors, after.buffers, steps.tolist(), after.losses.tolist(), momenta, strict=True)
            return [Trained(*row) for row in rows]

        def answer(member: int, request: Measure | Consult) -> Any:
            with nullcontext() if isinstance(request, Consult) else self._measuring:  # the trainer is shared
                return answered(job, self._trainer, orders, int(part.slots[member]), request)

        pairs = list(zip(part.slots.tolist(), part.sizes.tolist(), strict=True))
        seen = [visit(job, orders, slot, examples=n, layouts=layouts) for slot, n in pairs]
        for (slot, n), brought in zip(pairs, contributions(job, seen, train, answer), strict=True):
            collector.contribute(slot, brought, n)
        return collector.outcome

    def _together(
        self, cohort: Cohort, orders: Orders, part: _Part, work: tuple[Any, Group]
    ) -> tuple[Stacked, NDArray[np.int32]]:
        """One training of some clients of a block, and how many steps each made."""
        (pool, group), job = work, self._job
        spec, slots, sizes = group.spec, part.slots[group.members], part.sizes[group.members]
        assert isinstance(spec, LocalSGD)
        own = plan(
            spec, sizes, orders.cohort[slots], seed=job.seed, round=orders.round, limit=orders.most(slots),
            phase=phase(orders, group.phase),
        )  # fmt: skip
        arranged = calls(own.count, own.steps, padding=0.0 if cohort.unpadded else PADDING)
        own = own._replace(rows=self._rows(own, part, group.members, orders))  # type: ignore[arg-type]
        block = Block(own, arranged, group.buffers, spec.rate(orders.round), group.guides)
        return cohort.train(orders.start, pool, block), own.steps

    def _cohort_of(self, cohort: Cohort, spec: Client) -> Cohort:
        """The cohort that trains by a spec: the given one, unless a method's request has one of its own."""
        if spec is self._job.algorithm.client:
            return cohort
        if not isinstance(spec, LocalSGD):
            raise ConfigurationError(
                "the vectorised executor carries out local_sgd(); local_training() in a method runs in the executors "
                "debug, processes and ray"
            )
        with self._measuring:  # cohorts differ in what they take from a spec: its rule, and its batches for their size
            which = (id(cohort), rule(spec), spec.batch_size)
            if which not in self._others:
                _, probe = _probe(self._job.clients)
                self._others[which] = spec, open_cohort(self._job.task, spec, self._trainer, probe)
            self._others.move_to_end(which)
            while len(self._others) > OTHERS * self._threads:
                self._others.popitem(last=False)
            return self._others[which][1]

    def _rows(self, own: Plan, part: _Part, members: Slots, orders: Orders) -> Slots:
        """Row numbers of the pool, int64 [T, B], for the plan's row numbers of each member."""
        pool = self._job.clients.at(orders.round).pool
        if part.examples is not None or pool is None:
            begins: Slots = (np.cumsum(part.sizes) - part.sizes)[members]
            return own.rows + begins[own.client, None]
        held, positions = pool[1], orders.cohort[part.slots[members]]
        rows: Slots = held.values[own.rows + held.offsets[positions[own.client], None]]
        return rows

    def _explained(self, error: Exception, orders: Orders, part: _Part) -> FoedusError:
        """Whose training failed: the block's clients are trained one by one until it happens again."""
        try:
            DebugSession(self._job, self._trainer).run(orders.only(part.slots))
        except FoedusError as found:
            return found
        return TrainingError(
            f"the clients of a block could not be trained together in round {orders.round} "
            f"({type(error).__name__}: {error}), though each can alone. Use the executor debug or processes",
            round=orders.round,
        )


def _gathered(spec: Client, clients: Clients, cohort: Slots, slots: Slots) -> Iterator[_Part]:
    """The examples of clients that are read when asked, put together; nothing if all are empty."""
    read_ones = [read(clients, int(cohort[slot])) for slot in slots]
    sizes = np.array([len(e) for e in read_ones], np.int64)
    full = np.flatnonzero(sizes)
    for part in alike(spec, sizes[full]) if len(full) else ():
        own = full[part]
        yield _Part(slots[own], sizes[own], Examples.concat([read_ones[i] for i in own]))


# --- trying out ---------------------------------------------------------------------------------------------


def _tried_out(job: Job, trainer: Trainer) -> Cohort:
    """The cohort of a job, once it agrees with plain training over one step of real examples.

    Raises:
        UnsupportedOperator: the model cannot be batched over clients, or comes out differently.
        TrainingError: the model or loss fails on the examples, batched or not.
    """
    spec = job.algorithm.client
    assert isinstance(spec, LocalSGD)
    # A schedule may begin at 0, where every step is right because there is none.
    spec = replace(spec, lr=max(spec.rate(1), TRIED))
    position, probe = _probe(job.clients)
    three = _trial(spec, len(probe))
    work = [Assignment(spec, probe, three.of(np.array([i])), 1, job.clients.ids[position]) for i in range(3)]
    start = trainer.initial()
    plain = [trainer.train(start, w).weights for w in work]
    try:
        cohort = open_cohort(job.task, spec, trainer, probe)
        arranged = calls(three.count, three.steps, padding=0.0 if cohort.unpadded else 0.5)
        block = Block(three, arranged, np.stack([start.buffers] * 3), spec.rate(1))
        with cohort.settings():
            together = cohort.train(start, cohort.resident(probe), block)
    except FoedusError:
        raise
    except Exception as error:  # it failed batched where it does not alone
        raise UnsupportedOperator(f"{type(error).__name__}: {error}") from error
    for i, alone in enumerate(plain):
        if not _alike(Weights(together.vectors[i], together.buffers[i]), alone, start):
            raise UnsupportedOperator("this model: batched over clients, its step differs from the plain one")
    return cohort


def _trial(spec: LocalSGD, count: int) -> Plan:
    """One step of three clients that share ``count`` examples: two have batches of one width, so that they step
    together even where nothing may be padded, but of different examples, so that mixing them up would show."""
    fewer = max(1, count - 1)
    made = plan(spec, np.array([count, fewer, fewer]), np.arange(3), seed=0, round=1, limit=1)
    return made._replace(rows=(made.rows + (made.client == 2)[:, None].astype(np.int32)) % count)


def _probe(clients: Clients) -> tuple[int, Examples]:
    """A client with examples, its position, and a few of them."""
    sizes = clients.sizes
    searched = range(min(len(clients), SEARCHED)) if sizes is None else [int(np.argmax(sizes))]
    for position in searched:
        examples = read(clients, position)
        if len(examples):
            return position, examples.take(slice(0, PROBE))
    raise ConfigurationError("no client has any examples, so there is nothing to train on")


def _alike(a: Weights, b: Weights, start: Weights) -> bool:
    for x, y, z in zip(a, b, start, strict=True):
        moved = changed(y, z)
        tolerance = AGREEMENT * float(np.linalg.norm(moved)) + 1e-6 * float(np.linalg.norm(z[np.isfinite(z)]))
        if not np.isfinite(moved).all():
            continue  # it diverges at once, batched or not; its update will be refused by name
        if not float(np.linalg.norm(changed(x, y))) <= tolerance:
            return False
    return True

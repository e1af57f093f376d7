"""What one run on a server has learned so far, and what a round makes of it.

This is the algorithm's half of a server: orders from the state, sums of what clients send, the commit, the record. It
uses the same functions as the simulator (``foedus.rounds``), so that the same clients give the same model, and knows
nothing of messages, attempts or deadlines. A *step* is what clients are asked for once: a round, or, where edge
aggregators average among themselves first, one of their rounds within it.

Not here: who is let in, and when a step ends (``protocol/round.py``); what is written where (``coordinator``).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights
from foedus.core.aggregate import add, message_bytes
from foedus.core.method import Contribution, Vectors
from foedus.core.population import Clients
from foedus.core.select import Population
from foedus.core.timing import Buffered, Hierarchical
from foedus.core.values import Message, State
from foedus.errors import CheckpointError, ConfigurationError, DataError, Reason, UpdateRefused
from foedus.net.served import Served
from foedus.net.store import NEVER, UNTOLD, Enrolled
from foedus.privacy.claims import fewest, seen_by_nobody
from foedus.protocol import blob
from foedus.protocol.messages import Blob
from foedus.protocol.secagg.messages import Promise
from foedus.record.checkpoint import Checkpoint
from foedus.rounds import evaluate, freight, identity, sizes, start
from foedus.rounds.brought import sent_down
from foedus.rounds.commit import Server
from foedus.rounds.evaluate import ClientFigures, Evaluated, spread
from foedus.rounds.lines import described, round_line
from foedus.rounds.masks import lengths, masked_together, maskings, promise_of, sealed_update
from foedus.rounds.parcel import Intake, Parcel, Terms, admitted, let_in, outward, packed
from foedus.rounds.sending import Sender
from foedus.rounds.spending import Spending, spending
from foedus.rounds.state import COSTS, RunState
from foedus.rounds.work import BUFFERS, UPDATE, Job, Orders, Outcome, Refusal, union

Ints = NDArray[np.int64]
WHOLE = -1  # the edge of clients that belong to none
NOBODY = np.empty(0, np.int64)


class Step(NamedTuple):
    """Which step: the run's round, counted from 1, and which of the edges' rounds within it, counted from 0."""

    round: int
    part: int


class Counted(NamedTuple):
    """One update in a sum: the model it started from (a round), what it was scaled by, and its examples."""

    version: int
    scale: float
    examples: int


@dataclass
class Gathering:
    """What has come in a step: a sum for every edge, and one where there are none.

    Attributes:
        step: which.
        seats: how many clients there may be in it.
        outcomes: by edge.
        counted: what is in a sum, by position.
        refused: those that were looked at and left out.
        intakes: what checks and merges, by edge and version.
        opened: a masked sum may have been seen, and is lost: the round ends without a model, and is paid for.
    """

    step: Step
    seats: int = 1
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    counted: dict[int, Counted] = field(default_factory=dict)
    refused: list[tuple[Refusal, Parcel]] = field(default_factory=list)
    intakes: dict[tuple[int, int], Intake] = field(default_factory=dict)
    opened: bool = False


class Committed(NamedTuple):
    """What a step made: the state after it, its line for the record, and whether a round has ended with it."""

    state: RunState
    edges: dict[int, RunState]
    line: dict[str, Any] | None
    kept: dict[int, State]
    before: dict[int, tuple[int, int]]


class Learning:
    """A run's state between two steps, and what can be made of it.

    Args:
        served: what is learned.
        trainer: opened with its task: layouts, first weights, evaluation.
    """

    def __init__(self, served: Served, trainer: Trainer) -> None:
        self.served, self.trainer = served, trainer
        self._layouts = trainer.layout, trainer.buffer_layout
        self._spending: Spending | None = spending(
            served.algorithm, served.sampler, served.budget, buffers=self._averaged_buffers
        )
        self.sealing = sealed_update(served.algorithm, buffers=self._averaged_buffers)
        self.masking = masked_together(served.algorithm, trainer.layout, buffers=self._averaged_buffers)
        if served.population and self.sealing is not None:
            raise ConfigurationError(
                f"the silos of {served.algorithm.aggregator.label} are those that join first, and the run "
                f"{served.name!r} is for the population {served.population!r}. Serve it by a server of its own"
            )
        self._check_cohort()
        self._check_times()
        evaluate.check_targets(served.evaluation.stop_at, served.task.metrics, central=served.central_test is not None)
        self.state: RunState | None = None  # until the first round begins
        self.bundle: Blob | None = None  # the source that clients get
        self.part = 0
        self._edges: dict[int, RunState] = {}  # their models, between two of their rounds
        self._old: dict[int, tuple[Weights, Vectors, Mapping[str, Vectors]]] = {}  # by version: updates may be late
        self._names: Sequence[str] = ()
        self._members: Ints = NOBODY  # positions of those whose run it is
        self._sizes: Ints = NOBODY
        self._job: Job | None = None
        self._identity: str | None = None
        self._upload_bytes: int | None = None
        self._model: tuple[RunState, bytes] | None = None
        self._begins: dict[int, Terms] = {}  # of the present step, by edge
        self._made: dict[int, bytes] = {}  # orders of the present step, by edge
        self._kept: dict[int, State] = {}  # what edges keep
        self._before: dict[int, tuple[int, int]] = {}  # bytes sent and local steps in a round's steps before this one

    @property
    def _averaged_buffers(self) -> bool:
        return self.served.task.average_buffers and self.trainer.buffer_layout.size > 0

    def _check_cohort(self) -> None:
        """Refuse a number of clients that no masked sum has room for, or too small a one for what hides them."""
        masking, served = self.masking, self.served
        if not isinstance(served.cohort, int):
            return
        if masking is None:
            if served.cohort < (needed := fewest(served.algorithm.aggregator)):
                raise ConfigurationError(
                    f"{served.cohort} clients are asked in a round, and {served.algorithm.aggregator.label} hides them "
                    f"in sums of {needed} and more. Write cohort={needed}, or plan for fewer honest ones"
                )
            self._check_silos(math.ceil(served.cohort * served.each.over_selection - 1e-9))
            return
        most = math.ceil(served.cohort * served.each.over_selection - 1e-9)
        if not masking.least <= served.cohort <= most <= masking.withstand.clients:
            raise ConfigurationError(
                f"{most} clients are asked in a round, and {served.algorithm.aggregator.label} adds up from "
                f"{masking.least} to {masking.withstand.clients}. Write Withstand(clients={most}, ...), or another "
                "cohort"
            )
        masking.withstand.among(served.cohort)

    def _check_silos(self, most: int) -> None:
        """Refuse more clients in a round than share a key."""
        if self.sealing is not None and most > self.sealing.silos:
            raise ConfigurationError(
                f"{most} clients are asked in a round, and {self.served.algorithm.aggregator.label} is for "
                f"{self.sealing.silos} silos. Write encrypted({most}, ...), or cohort={self.sealing.silos}"
            )

    def _check_times(self) -> None:
        """Refuse a round that has no time for training beside the four turns of a masked sum."""
        each = self.served.each
        if self.masking is not None and each.deadline <= 4 * each.patience:
            raise ConfigurationError(
                f"a masked sum may wait {each.patience:g} s (patience) for keys, shares, votes and answers each, "
                f"and the round ends after {each.deadline:g} s: that leaves no time to train. Write a deadline well "
                f"above {4 * each.patience:g} s, or a shorter patience"
            )

    @property
    def promise(self) -> Promise:
        """What clients are promised of the present step's masks."""
        return promise_of(self._terms(WHOLE))

    # --- who there is

    def enrolled(self, clients: Sequence[Enrolled]) -> None:
        """The server's clients by position, of which some are of the run's population.

        Who is not, was revoked, or has never come is not waited for, as though there were nothing to train on.
        """
        mine = np.array([self.is_for(client.population) for client in clients], bool)
        gone = np.array([client.revoked_at is not None for client in clients], bool)
        said = np.array([client.examples for client in clients], np.int64)
        self._sizes = np.where(gone | ~mine | (said == NEVER), 0, np.where(said == UNTOLD, -1, said))
        self._names, self._members, self._job = [client.name for client in clients], np.flatnonzero(mine), None

    def is_for(self, population: str) -> bool:
        """Whether the clients of a population take part."""
        return self.served.population in ("", population)

    @property
    def population(self) -> int:
        """How many clients can ever send something."""
        return int(np.count_nonzero(self._sizes))

    @property
    def job(self) -> Job:
        """The run's, with the clients that there are now. Nobody's data is here to be read."""
        if self._job is not None:
            return self._job
        served = self.served
        known = bool(len(self._sizes)) and bool((self._sizes >= 0).all())
        sizes = self._sizes if known else np.where(self._sizes == 0, 0, 1)
        clients = Clients.generated(_elsewhere, list(self._names), sizes=sizes, central_test=served.central_test)
        self._job = Job(served.task, served.algorithm, clients, served.seed)
        return self._job

    @property
    def server(self) -> Server:
        """What decodes; its noise comes from the operating system."""
        return Server(self.job, *self._layouts, secret=None)

    def cohort(self, step: Step) -> Ints | None:
        """Who is asked in a step, where that is drawn or everybody; None where the first that come are taken."""
        cohort, members = self.served.cohort, self._members
        if isinstance(cohort, int) or isinstance(self.served.algorithm.timing, Buffered):
            return None
        sizes, population = self._sizes[members], len(members)
        told = Population(population, sizes if bool((sizes >= 0).all()) else None)
        asked = np.asarray(self.served.sampler.sample(told, self.served.seed, step.round))
        sound = asked.ndim == 1 and (asked.dtype.kind in "iu" or not asked.size)
        if not sound or len(np.unique(asked)) < len(asked) or ((asked < 0) | (asked >= population)).any():
            raise ConfigurationError(
                f"the sampler {self.served.sampler.label} must give different positions from 0 to {population - 1}, "
                f"and gave {reprlib.repr(asked.tolist())} in round {step.round}"
            )
        found: Ints = members[asked[sizes[asked] != 0].astype(np.int64)]
        if self.sealing is not None:  # whoever enrolled beyond the number has no place in the sum
            found = found[found < self.sealing.silos]
        return found

    # --- beginning, and what lies on a disk

    def begin(self) -> RunState:
        """The state before the first round, of the clients that there are now."""
        if self.state is None:
            self.state = self.server.first(start.weights(self.served.start, self.trainer))
        return self.state

    def check_start(self) -> None:
        """Whether there are weights to start from; before anybody is told that there is a server.

        Raises:
            ConfigurationError: they cannot be read, or are not this model's.
        """
        if self.served.start is not None:
            start.weights(self.served.start, self.trainer)

    @property
    def step(self) -> Step:
        """The step that is next, or under way."""
        return Step((0 if self.state is None else self.state.round) + 1, self.part)

    @property
    def parts(self) -> int:
        """How many steps a round has."""
        timing = self.served.algorithm.timing
        return timing.rounds if isinstance(timing, Hierarchical) else 1

    @property
    def over(self) -> str | None:
        """Why there is no further round; None if there is one."""
        state = self.state
        if state is None:
            return None
        if self._spending is not None and state.stopped is None and not self.part:
            state.stopped = self._spending.stop(state)
        if state.stopped is not None:
            return state.stopped
        return f"{state.round} rounds are done" if state.round >= self.served.rounds else None

    def identity(self) -> str:
        """A digest of all that must be the same for a run to go on; the number of rounds may grow."""
        served, trainer = self.served, self.trainer
        if self._identity is not None:
            return self._identity
        pieces = identity.pieces(served.task, served.algorithm.client, served.sampler, trainer=trainer)
        pieces |= {"first weights": start.describe(served.start)}
        told = (
            served.name, served.algorithm.label, served.seed, served.sampler.label, trainer.layout.digest(),
            trainer.buffer_layout.digest(), trainer.backend, [m.name for m in served.task.metrics],
            served.task.average_buffers, pieces, None if self._spending is None else self._spending.event,
        )  # fmt: skip
        self._identity = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        return self._identity

    def checkpoint(self, state: RunState, kept: Mapping[int, State]) -> bytes:
        """All that the next round depends on, as bytes: the state, what edges keep, and models that updates under way
        started from."""
        saved = state.checkpoint(self.identity(), "served")
        arrays = dict(saved.arrays)
        for edge, memory in kept.items():
            arrays |= {f"edges.{edge}/{name}": array for name, array in memory.items()}
        for version, (weights, down, told) in self._old.items():
            arrays |= {f"old.{version}/vector": weights.vector, f"old.{version}/buffers": weights.buffers}
            arrays |= {f"old.{version}/{name}": array for name, array in freight.beside_arrays(down, told).items()}
        return blob.pack(arrays, {"kind": "checkpoint", "values": json.dumps(saved.values)})

    def restore(self, data: bytes) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is of another run.
        """
        found = blob.unpack(data)
        values = json.loads(found.told.get("values", "{}"))
        if found.told.get("kind") != "checkpoint" or values.get("identity") != self.identity():
            raise CheckpointError(
                f"the run {self.served.name!r} was begun with another task, algorithm, cohort or seed: give those, or "
                "another name"
            )
        arrays = {name: np.array(array) for name, array in found.arrays.items()}
        channels = tuple(self.served.algorithm.sides)
        population = max(len(self._names), 1 + int(arrays["costs.clients"].max(initial=-1)))
        self.state = RunState.restored(Checkpoint(arrays, values), population, channels)
        self._kept = _by_number(arrays, "edges.")
        for version, own in _by_number(arrays, "old.").items():
            self._old[version] = Weights(own["vector"], own["buffers"]), *freight.beside_of(own)
        self.again()

    @property
    def once(self) -> bool:
        """Whether what a round releases may be released once only: it has noise, or clients answer it once."""
        rules = self.served.algorithm.aggregator, *self.served.algorithm.sides.values()
        noisy = self._spending is not None or any(rule.event is not None for rule in rules)
        return noisy or self.masking is not None or self.sealing is not None

    def skip(self, reached: int) -> None:
        """Rounds up to this one were released by a server that was lost: they are counted, and not made again.

        Raises:
            CheckpointError: the noise of these rounds belongs to that of the next.
        """
        state = self.state
        assert state is not None
        if self.served.algorithm.aggregator.streams:
            raise CheckpointError(
                f"the run {self.served.name!r} was put back to round {state.round}, and had come to round {reached}: "
                f"the noise of {self.served.algorithm.aggregator.label} hangs together over rounds, was drawn once for "
                "each, and what was drawn is lost. Serve what is left as a run of its own, under another name"
            )
        if self._spending is not None:
            self._spending.missed(state, reached)
        state.round = reached

    # --- orders

    def edge(self, position: int) -> int:
        """The edge aggregator that a client belongs to."""
        timing = self.served.algorithm.timing
        if not isinstance(timing, Hierarchical):
            return WHOLE
        return int(np.asarray(timing.edge(np.array([position])))[0])

    def orders_for(self, position: int) -> bytes:
        """The orders that a client is sent now: the same for all, or for all of an edge."""
        edge = self.edge(position) if self.part else WHOLE
        if edge not in self._made:
            terms = self._terms(edge)
            self._made[edge] = freight.orders_blob(terms.orders, terms.travels, run=self.served.name)
        return self._made[edge]

    @property
    def upload_bytes(self) -> int:
        """The most bytes that one upload of the run may take."""
        if self._upload_bytes is None:
            self._upload_bytes = sizes.upload_bytes(self._terms(WHOLE))
        return self._upload_bytes

    def late_orders(self, version: int) -> bytes:
        """The orders of an earlier round, whose updates are still awaited."""
        terms = self._late_terms(version)
        return freight.orders_blob(terms.orders, terms.travels, run=self.served.name)

    def model(self) -> bytes:
        """The weights as they are now, as orders are."""
        state = self._begun
        if self._model is None or self._model[0] is not state:
            terms = Terms.of(self.job, Orders(state.round, state.weights, NOBODY), self._layouts)
            self._model = state, freight.orders_blob(terms.orders, terms.travels, run=self.served.name)
        return self._model[1]

    @property
    def _begun(self) -> RunState:
        assert self.state is not None, "no round has begun"
        return self.state

    def _terms(self, edge: int) -> Terms:
        """What both sides of the present step know, for the clients of an edge."""
        if edge in self._begins:
            return self._begins[edge]
        state, server = self._begun, self.server
        begin = Sender(server).sent(state).weights
        if self.part and edge in self._edges:
            begin = self._edges[edge].weights
        orders = Orders(
            self.step.round, begin, NOBODY, down=self._down(state), told=server.told(state), part=self.part
        )  # fmt: skip
        self._begins[edge] = Terms.of(server.job, orders, self._layouts)
        return self._begins[edge]

    def _down(self, state: RunState) -> Vectors:
        method = self.served.algorithm.method
        return {} if method is None else sent_down(method, state.method, state.round + 1)

    def scale(self, version: int) -> float:
        """How much an update counts that started from the model before a round."""
        timing = self.served.algorithm.timing
        if not isinstance(timing, Buffered):
            return 1.0
        age = max(0, self.step.round - version)
        return timing.staleness.weight(age) * (1.0 if timing.mixing is None else timing.mixing)

    def remember(self, versions: set[int]) -> None:
        """Keep the models that updates under way started from, and no others."""
        if not isinstance(self.served.algorithm.timing, Buffered):
            return
        terms = self._terms(WHOLE)
        if self.step.round not in self._old:
            self._old[self.step.round] = terms.orders.start, dict(terms.orders.down), dict(terms.orders.told)
        wanted = versions | {self.step.round}
        self._old = {version: model for version, model in self._old.items() if version in wanted}

    # --- sums

    def take(self, gathering: Gathering, position: int, parcel: Parcel, *, version: int, scale: float) -> None:
        """Check one client's parcel, and merge it.

        Args:
            gathering: of the present step.
            position: whose it is.
            parcel: what came; the arrays in it may be views.
            version: the round whose orders it trained from.
            scale: what it was scaled by.

        Raises:
            UpdateRefused: with the reason; the sums are as they were.
        """
        edge = self.edge(position)
        if (edge, version) not in gathering.intakes:
            outcome = gathering.outcomes.setdefault(edge, Outcome())
            late = version in self._old and version != self.step.round
            terms = self._late_terms(version) if late else self._terms(edge)
            gathering.intakes[edge, version] = Intake(terms, seats=gathering.seats, outcome=outcome)
        parcel = outward(self.served.algorithm, parcel)
        if position in gathering.counted:
            raise UpdateRefused(
                f"the update of client {position} is counted already in round {self.step.round}",
                client=position, reason=Reason.REPLAY,
            )  # fmt: skip
        gathering.intakes[edge, version].take(position, parcel)
        gathering.counted[position] = Counted(version, scale, parcel.examples)

    def reveal(
        self, gathering: Gathering, positions: Sequence[int], totals: Mapping[str, NDArray[Any]], sent: Sequence[int]
    ) -> None:
        """Take the opened sums of a masked round.

        Args:
            gathering: of the present step.
            positions: of those in the sums.
            totals: the sums by channel, as the aggregators add up messages.
            sent: bytes that each of them has sent.

        Raises:
            SecureAggregationFailed: no messages that clients write add up to these.
        """
        count = len(positions)
        examples = [max(0, int(self._sizes[position])) for position in positions]
        messages = {name: {"sum": total, "count": np.array([count], np.int64)} for name, total in totals.items()}
        for name, masking in maskings(self.served.algorithm, buffers=self._averaged_buffers).items():
            if name in messages:
                masking.check(messages[name])
        gathering.outcomes = {
            WHOLE: Outcome(
                messages.pop(UPDATE), messages.pop(BUFFERS, None), messages,
                dict(lengths(self.served.algorithm, self.trainer.layout)), list(positions), examples, [0] * count,
                [math.nan] * count, list(sent), count,
            )
        }  # fmt: skip
        step = self.step.round
        gathering.counted = {p: Counted(step, 1.0, n) for p, n in zip(positions, examples, strict=True)}

    # --- sums that are encrypted

    def closed(self, gathering: Gathering) -> bool:
        """Whether there is a sum that those who have the key must decrypt before anything can be made of it."""
        found = [outcome.message for outcome in gathering.outcomes.values() if outcome.message is not None]
        return self.sealing is not None and any("sum" not in message for message in found)

    def handed(self, gathering: Gathering) -> bytes:
        """The encrypted sum, as bytes for those who decrypt it."""
        message = gathering.outcomes[WHOLE].message
        assert message is not None
        return freight.closed_blob(message, run=self.served.name, round=self.step.round)

    def opened(self, given: blob.Tensors, digest: bytes, count: int, position: int) -> Message:
        """What a client says that a sum opens to.

        Args:
            given: what came.
            digest: of the sum that was handed out.
            count: how many updates are in it.
            position: whose answer it is.

        Raises:
            UpdateRefused, MalformedMessage: it is no answer to this, or no such sum can be.
        """
        message, of = freight.opened_of(given)
        if of != digest:
            told = f"the answer of client {position} is about another sum than the one that it was given"
            raise UpdateRefused(told, client=position, reason=Reason.REPLAY)
        assert self.sealing is not None
        terms = self._terms(WHOLE)
        context = terms.context(position, UPDATE, terms.layout(UPDATE, 0).size)
        return self.sealing.opened(message, count, context)

    def open(self, gathering: Gathering, message: Message) -> None:
        """Put what a sum opens to in its place."""
        gathering.outcomes[WHOLE].message = message

    def _late_terms(self, version: int) -> Terms:
        weights, down, told = self._old[version]
        return Terms.of(self.job, Orders(version, weights, NOBODY, down=down, told=told), self._layouts)

    @property
    def summable(self) -> bool:
        """Whether a partial sum says nothing of a single update: all that is merged is added up, and in one place."""
        algorithm = self.served.algorithm
        rules = [algorithm.aggregator, algorithm.buffers, *algorithm.sides.values()]
        return all(rule.merge is add or rule.sealed is not None for rule in rules) and not isinstance(
            algorithm.timing, Hierarchical
        )

    def partial(self, gathering: Gathering) -> bytes:
        """A sum under way, as bytes; to be written only if enough are in it."""
        (outcome,) = gathering.outcomes.values()
        arrays: dict[str, NDArray[Any]] = {}
        for channel, message in (("update", outcome.message), ("buffers", outcome.buffers), *outcome.sides.items()):
            arrays |= {f"{channel}/{name}": array for name, array in (message or {}).items()}
        told = {
            "step": list(gathering.step), "counted": [[p, *each] for p, each in gathering.counted.items()],
            "clients": outcome.clients, "examples": outcome.examples, "steps": outcome.steps,
            "losses": [repr(loss) for loss in outcome.losses], "sent": outcome.sent, "senders": outcome.senders,
            "sizes": outcome.sizes, "reports": {str(c): dict(report) for c, report in outcome.reports.items()},
        }  # fmt: skip
        return blob.pack(arrays | {"told": np.frombuffer(json.dumps(told).encode(), np.uint8)}, {"kind": "sum"})

    def resumed(self, data: bytes, *, seats: int) -> Gathering:
        """A sum that was written by :meth:`partial`."""
        arrays = {name: np.array(array) for name, array in blob.unpack(data).arrays.items()}
        told = json.loads(arrays.pop("told").tobytes())
        messages: dict[str, Message] = {}
        for path, array in arrays.items():
            channel, _, name = path.rpartition("/")
            messages.setdefault(channel, {})[name] = array
        outcome = Outcome(
            messages.pop("update", None), messages.pop("buffers", None), messages, told["sizes"], told["clients"],
            told["examples"], told["steps"], [float(loss) for loss in told["losses"]], told["sent"], told["senders"],
            reports={int(c): report for c, report in told["reports"].items()},
        )  # fmt: skip
        counted = {position: Counted(*each) for position, *each in told["counted"]}
        return Gathering(Step(*told["step"]), seats, {WHOLE: outcome}, counted)

    def between(self, committed: Committed) -> bytes:
        """What edges have among themselves after a step that does not end its round, as bytes."""
        arrays: dict[str, NDArray[Any]] = {}
        values: dict[str, Any] = {}
        for edge, own in committed.edges.items():
            saved = own.checkpoint(self.identity(), "served")
            arrays |= {f"edge.{edge}/{name}": array for name, array in saved.arrays.items()}
            values[str(edge)] = saved.values
        before = {str(client): list(work) for client, work in committed.before.items()}
        told = {"step": [self.step.round, self.part + 1], "before": before, "values": values}
        return blob.pack(arrays, {"kind": "between", "told": json.dumps(told)})

    def go_on(self, data: bytes) -> Step:
        """The step after what :meth:`between` wrote."""
        found = blob.unpack(data)
        told = json.loads(found.told["told"])
        arrays = {name: np.array(array) for name, array in found.arrays.items()}
        channels = tuple(self.served.algorithm.sides)
        self.again()
        for edge, own in _by_number(arrays, "edge.").items():
            saved = Checkpoint(own, told["values"][str(edge)])
            self._edges[edge] = RunState.restored(saved, len(self._names), channels)
        self._before = {int(client): (work[0], work[1]) for client, work in told["before"].items()}
        self.part = told["step"][1]
        return self.step

    def united(self, found: Sequence[Gathering], *, seats: int) -> Gathering:
        """One gathering out of several of the same step, which others have merged."""
        outcomes = [outcome for each in found for outcome in each.outcomes.values()]
        counted = {position: told for each in found for position, told in each.counted.items()}
        return Gathering(self.step, seats, {WHOLE: union(self.job, outcomes)}, counted)

    # --- the end of a step

    def commit(self, gathering: Gathering, asked: Ints) -> Committed:
        """What a step makes; nothing here is changed until :meth:`settle`."""
        state = copy.copy(self._begun)
        state.sides, state.costs = dict(state.sides), _grown(state.costs, len(self._names))
        outcomes = {edge: _with_refused(gathering, edge, self.edge) for edge in gathering.outcomes}
        down = self._bytes_down(state)
        if self.part + 1 < self.parts:
            edges = {edge: self._averaged(edge, found, state) for edge, found in outcomes.items()}
            before = {client: work for found in outcomes.values() for client, work in self._with_before(found).items()}
            return Committed(state, {**self._edges, **edges}, None, self._kept, self._before | before)
        told: dict[str, Any] = {}
        kept = self._kept
        if isinstance(self.served.algorithm.timing, Hierarchical):
            told["edges"] = {"count": len(outcomes)}
        if self.parts > 1:
            outcome, kept, told["edges"]["bytes_up"] = self._of_edges(outcomes, state)
        else:
            outcome = union(self.job, list(outcomes.values()))
        line = self._round(state, outcome, gathering, asked, down * self.parts, told)
        return Committed(state, {}, line, kept, {})

    def settle(self, committed: Committed) -> None:
        """A commit that was written: it is the state from now on."""
        self._made, self._begins = {}, {}
        self.state, self._edges, self._kept = committed.state, committed.edges, committed.kept
        self._before = committed.before
        self.part = 0 if committed.line is not None else self.part + 1

    def again(self) -> None:
        """The round begins anew: what edges had among themselves is forgotten."""
        self.part, self._edges, self._before, self._made, self._begins = 0, {}, {}, {}, {}

    def _round(
        self, state: RunState, outcome: Outcome, gathering: Gathering, asked: Ints, down: int, told: dict[str, Any]
    ) -> dict[str, Any]:  # fmt: skip
        """Commit a round into a state; its line."""
        number = self.step.round
        unseen = seen_by_nobody(self.served.algorithm.aggregator)
        if sent := [n for n in outcome.sent if n]:
            state.sent = round(sum(sent) / len(sent))
        made = (outcome.clients or unseen) and not gathering.opened
        if self._spending is not None and (made or gathering.opened):
            self._spending.charge(state, number)
        if made:
            self.server.commit(state, outcome, number, pull=self._pull(gathering, state))
        state.round = number
        up = dict(zip(outcome.clients, outcome.sent, strict=True))
        costs = np.zeros((len(asked), len(COSTS)))
        costs[:, 0], costs[:, 2] = 1, down
        costs[:, 1] = [up.get(int(client), 0) for client in asked]
        state.costs[asked] += costs
        if isinstance(self.served.algorithm.timing, Buffered) and gathering.counted:
            ages = [number - each.version for each in gathering.counted.values()]
            told["staleness"] = {"mean": float(np.mean(ages)), "most": int(max(ages))}
        line = round_line(self.job, state, outcome, costs, spending=self._spending, told=told)
        return line | self._central(state)

    def _central(self, state: RunState) -> dict[str, Any]:
        """Figures on the server's own test set, where it has one and they are due."""
        asked = self.served.evaluation
        if not self.due(state.round):
            return {}
        found = evaluate.evaluate(self.job, self.trainer, state, None).figures
        central = found.get("central", {})
        state.stopped = evaluate.reached(central, asked.stop_at, self.served.task.metrics)
        return found

    def due(self, number: int) -> bool:
        """Whether there is an evaluation after a round."""
        every = self.served.evaluation.every
        return bool(every) and (number % every == 0 or number == self.served.rounds)

    def spread(self, found: Sequence[ClientFigures]) -> dict[str, Any]:
        """The figures of an evaluation on clients, over clients; nobody's own are written down."""
        metrics = self.served.task.metrics
        names = ["loss", *(m.name for m in metrics)]
        figures: dict[str, Any] = {"clients": spread([_only(each.figures, names) for each in found], metrics)}
        if personal := [_only(each.personal, names) for each in found if each.personal is not None]:
            figures["personal"] = spread(personal, metrics)
        return Evaluated(figures, {}).figures

    def _bytes_down(self, state: RunState) -> int:
        """Bytes of what each client is sent for a step."""
        server = self.server
        down = Sender(server).sent(state).bytes + message_bytes(dict(self._down(state)))
        return down + sum(message_bytes(dict(told)) for told in server.told(state).values())

    def _pull(self, gathering: Gathering, state: RunState) -> Weights | None:
        """What pulls the present model towards those that stale updates started from (see ``sim/flights.py``)."""
        timing = self.served.algorithm.timing
        if not isinstance(timing, Buffered):
            return None
        total = sum(each.examples for each in gathering.counted.values())
        if not total:
            return None
        vector, buffers = np.zeros(len(state.weights.vector)), np.zeros(len(state.weights.buffers))
        for (version, scale), weight in sorted(_weights(gathering).items()):
            began = self._old[version][0] if version in self._old else state.weights
            if timing.mixing is not None:
                vector += scale * weight * (began.vector.astype(np.float64) - state.weights.vector)
            buffers += scale * weight * (began.buffers.astype(np.float64) - state.weights.buffers)
        return Weights(vector / total, buffers / total)

    # --- edges

    def _averaged(self, edge: int, found: Outcome, state: RunState) -> RunState:
        """An edge's model after one of its own rounds."""
        server = self.server.averaging()
        begin = Sender(self.server).sent(state).weights
        own = copy.copy(self._edges[edge]) if edge in self._edges else server.first(begin)
        own.sides = dict(own.sides)
        if found.message is not None:
            server.commit(own, found, self.step.round)
        return own

    def _with_before(self, found: Outcome) -> dict[int, tuple[int, int]]:
        """Bytes sent and local steps by client, in this step and those of the round before it."""
        rows = zip(found.clients, found.sent, found.steps, strict=True)
        before = self._before
        return {c: (before.get(c, (0, 0))[0] + sent, before.get(c, (0, 0))[1] + steps) for c, sent, steps in rows}

    def _of_edges(self, outcomes: Mapping[int, Outcome], state: RunState) -> tuple[Outcome, dict[int, State], int]:
        """The round's outcome, of what the edges send after the last of their rounds; what they keep; their bytes."""
        begin, number = Sender(self.server).sent(state).weights, len(self._names)
        orders = Orders(
            self.step.round, begin, NOBODY, down=self._down(state), told=self.server.told(state),
            kept={number + edge: own for edge, own in self._kept.items()},
        )  # fmt: skip
        terms = Terms.of(self.job, orders, self._layouts)
        total, edge_bytes = Outcome(), 0
        figures = []
        for edge, found in sorted(outcomes.items()):
            own = self._averaged(edge, found, state)
            if found.senders:
                update = own.weights.vector - begin.vector
                brought = Contribution(update, buffers=own.weights.buffers)
                parcel = packed(terms, number + edge, brought, found.weight)
                let_in(terms, total, number + edge, parcel, admitted(terms, number + edge, parcel))
                edge_bytes += parcel.bytes
            work = self._with_before(found)
            sent, steps = ([work[client][i] for client in found.clients] for i in (0, 1))
            figures.append(replace(found, message=None, buffers=None, sides={}, sent=sent, steps=steps))
        total.senders = 0  # those of the clients are counted
        kept = {client - number: own for client, own in total.kept.items()}
        total.kept = {}
        return union(self.job, [*figures, total]), {**self._kept, **kept}, edge_bytes

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        layouts = self.trainer.layout.size, self.trainer.buffer_layout.size
        told = described(
            self.job, cohort=self.served.sampler.label, rounds=self.served.rounds, layouts=layouts,
            backend=self.trainer.backend,
        )  # fmt: skip
        budget = self.served.budget
        return told | ({} if budget is None else {"budget": budget.label})


def _elsewhere(client: object) -> Any:
    raise DataError(f"the data of client {client!r} is with the client; a server never reads it")


def _only(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The figures that were asked for; a client may send others, or none."""
    return {name: float(figures.get(name, float("nan"))) for name in names}


def _grown(costs: NDArray[np.float64], population: int) -> NDArray[np.float64]:
    """Each client's totals, with room for those that came since; a copy."""
    grown = np.zeros((max(population, len(costs)), len(COSTS)))
    grown[: len(costs)] = costs
    return grown


def _with_refused(gathering: Gathering, edge: int, edge_of: Any) -> Outcome:
    """An edge's outcome with those that were refused listed, as a simulated one has them."""
    found = gathering.outcomes[edge]
    listed = replace(
        found, clients=[*found.clients], examples=[*found.examples], steps=[*found.steps], losses=[*found.losses],
        sent=[*found.sent], refused=[*found.refused], sides=dict(found.sides), sizes=dict(found.sizes),
    )  # fmt: skip
    for refusal, parcel in gathering.refused:
        if edge_of(refusal.client) == edge and refusal.client not in listed.clients:
            listed.clients.append(refusal.client)
            listed.examples.append(max(0, parcel.examples))
            listed.steps.append(max(0, parcel.steps))
            listed.losses.append(parcel.loss)
            listed.sent.append(parcel.bytes)
            listed.refused.append(refusal)
    return listed


def _weights(gathering: Gathering) -> dict[tuple[int, float], int]:
    """How many examples the updates stand for that started from a version and count so much."""
    found: dict[tuple[int, float], int] = {}
    for each in gathering.counted.values():
        found[each.version, each.scale] = found.get((each.version, each.scale), 0) + each.examples
    return found


def _by_number(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[int, State]:
    found: dict[int, State] = {}
    for name, array in arrays.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition("/")
            found.setdefault(int(number), {})[rest] = array
    return found


__all__ = ["Committed", "Gathering", "Learning", "Step"]

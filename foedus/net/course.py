"""One run under way on a server: its machine's state, what has come, and who is asked next.

A value that the coordinator changes; everything that decides is in ``protocol/round.py`` and ``learning.py``.

Not here: what is written, and answered (``coordinator``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from foedus.core.timing import Buffered
from foedus.core.values import Message
from foedus.net.learning import Committed, Gathering, Learning
from foedus.net.masking import MaskedSum
from foedus.net.store import SeatRow
from foedus.protocol import round as machine
from foedus.protocol.messages import ENCRYPTED, SECURE, Kind, Window
from foedus.protocol.pacing import come_back
from foedus.protocol.round import At, Phase, Rules, Seat, State
from foedus.rounds.evaluate import ClientFigures

EACH = 0.002  # seconds that a round's every client adds to the pause between two questions of one
TWO = 2  # clients must say the same of a sum, before it is believed
FIRST_PERIOD = 2.0  # seconds that a round is thought to take, before one has
EVALUATION = "/evaluation"  # what a run's evaluations are called after its name
DECRYPTION = "/decryption"  # and the opening of its encrypted sums


class Wanted(NamedTuple):
    """Who is to take part in a step: how many end it, how many are let in at a time, and who (None: whoever comes)."""

    goal: int
    places: int
    cohort: frozenset[int] | None


class Handed(NamedTuple):
    """An encrypted sum that is given to be decrypted: its bytes, their digest, and how many updates are in it."""

    content: bytes
    digest: bytes
    updates: int


@dataclass
class Course:
    """One run, or what clients are asked beside its rounds: to evaluate its model, to decrypt a sum.

    Attributes:
        name: of the rows in the store.
        kind: what clients are asked to do.
        rules: of the machine.
        state: of the machine.
        gathering: what has come in the step under way.
        masked: the conversation about its masked sum, once it has begun.
        figures: what has come in an evaluation, by position.
        handed: the sum that is being decrypted, and ``answers``: what it opens to, by the position of who says so.
        pending: a commit that could not be written yet.
        uploads: places of uploads, by key.
        stored: digests of updates that are on a disk, by key.
        written: digest of the partial sum on the disk, and how many are in it; ``""`` for none.
        wrote_at: when it was written.
        key: of the round, sealed; empty if nothing is sealed.
        unwritten: the machine's state is ahead of the store; harmless, and made good at the next tick.
        begun_at, period: of the step under way, and how long the last ones took.
    """

    name: str
    learning: Learning
    rules: Rules
    kind: Kind = Kind.TRAIN
    state: State = field(default_factory=State)
    gathering: Gathering | None = None
    masked: MaskedSum | None = None
    figures: dict[int, ClientFigures] = field(default_factory=dict)
    handed: Handed | None = None
    answers: dict[int, Message] = field(default_factory=dict)
    pending: Committed | None = None
    uploads: dict[bytes, bytes] = field(default_factory=dict)
    stored: dict[bytes, str] = field(default_factory=dict)
    written: tuple[str, int] = ("", 0)
    wrote_at: float = 0.0
    key: bytes = b""
    checkpoint: str = ""
    unwritten: bool = False
    begun_at: float = 0.0
    period: float = FIRST_PERIOD

    @staticmethod
    def training(learning: Learning) -> Course:
        """The run itself."""
        each, timing = learning.served.each, learning.served.algorithm.timing
        rules = Rules(
            minimum=learning.served.minimum, window_s=each.window, deadline_s=each.deadline, retry_s=each.retry,
            attempts=each.attempts, flowing=isinstance(timing, Buffered),
        )  # fmt: skip
        return Course(learning.served.name, learning, rules)

    @staticmethod
    def evaluating(learning: Learning) -> Course:
        """Its evaluations on clients: one attempt each, and whoever comes counts."""
        each = learning.served.each
        rules = Rules(minimum=each.minimum, window_s=each.window, deadline_s=each.deadline, attempts=1)
        return Course(learning.served.name + EVALUATION, learning, rules, Kind.EVALUATE)

    def gathered(self) -> Gathering:
        """What has come in the step under way; nothing, at first."""
        if self.gathering is None:
            self.gathering = Gathering(self.learning.step, seats=max(1, self.state.places))
        return self.gathering

    @staticmethod
    def decrypting(learning: Learning) -> Course:
        """The opening of its encrypted sums: one attempt each, in which those are asked who are in the sum."""
        deadline = learning.served.each.deadline
        rules = Rules(minimum=TWO, window_s=deadline, deadline_s=deadline, attempts=1)
        return Course(learning.served.name + DECRYPTION, learning, rules, Kind.DECRYPT)

    # --- who is asked

    def wanted(self) -> Wanted:
        """Who is to take part in the step that is next."""
        learning = self.learning
        served, timing = learning.served, learning.served.algorithm.timing
        there = learning.population
        if self.kind is Kind.EVALUATE:
            return Wanted(there, there, None)
        if isinstance(timing, Buffered):
            places = served.cohort if isinstance(served.cohort, int) else there
            return Wanted(timing.size or 2**31, places, None)
        if isinstance(served.cohort, int):
            places = math.ceil(served.cohort * served.each.over_selection - 1e-9)
            return Wanted(min(served.cohort, there), min(places, max(there, served.cohort)), None)
        cohort = learning.cohort(learning.step)
        assert cohort is not None
        return Wanted(len(cohort), len(cohort), frozenset(cohort.tolist()))

    @property
    def run(self) -> str:
        """What clients call it."""
        return self.learning.served.name

    @property
    def every(self) -> float | None:
        """Seconds from step to step, where the clock decides."""
        timing = self.learning.served.algorithm.timing
        return timing.seconds if isinstance(timing, Buffered) and self.kind is Kind.TRAIN else None

    @property
    def masks(self) -> bool:
        """Whether updates are seen in masked sums only."""
        return self.kind is Kind.TRAIN and self.learning.masking is not None

    @property
    def seals(self) -> bool:
        """Whether updates come encrypted."""
        return self.kind is Kind.TRAIN and self.learning.sealing is not None

    @property
    def protections(self) -> tuple[str, ...]:
        """What is promised to those who take part."""
        own = self.learning.served.protections
        if self.kind is not Kind.EVALUATE and self.learning.sealing is not None:
            return (*own, ENCRYPTED)
        return (*own, *((SECURE,) if self.masks else ()))

    @property
    def under_way(self) -> bool:
        """Whether something is wanted of clients."""
        return self.state.phase in (Phase.SELECTING, Phase.TRAINING, Phase.AGGREGATING, Phase.FAILED)

    def versions(self) -> set[int]:
        """The rounds that updates under way started from."""
        return {seat.round for seat in self.state.at(*machine.ENGAGED)} if self.rules.flowing else set()

    def names(self, digest: str) -> bool:
        """Whether a blob is its checkpoint, its partial sum or one of its updates."""
        return digest in (self.checkpoint, self.written[0]) or digest in self.stored.values()

    # --- time

    def pause(self, least: float) -> float:
        """Seconds between two questions of one client: a thousand that all ask at once would do nothing else."""
        return max(least, EACH * len(self.state.seats))

    def window(self, now: float, *, pause: float) -> Window:
        """When one client is to come back."""
        pause = self.pause(pause)
        left = machine.worthwhile_s(self.state, now)
        if self.state.phase is Phase.TRAINING:  # it will not last until its deadline, most likely
            left = min(left, max(pause, self.period - (now - self.begun_at)))
        elif self.state.phase is not Phase.FAILED:
            left = min(left, pause)
        cohort = self.learning.served.cohort
        few = cohort if isinstance(cohort, int) else self.learning.population  # before anybody has been wanted
        wanted = max(1, self.state.places or few)
        return come_back(
            population=max(1, self.learning.population), wanted=wanted, period_s=self.period, left_s=left, floor_s=pause
        )

    def ended(self, now: float) -> None:
        """A step is over: the next ones are thought to take about as long."""
        took = max(0.0, now - self.begun_at)
        self.period = took if self.period == FIRST_PERIOD else 0.5 * self.period + 0.5 * took

    # --- rows

    def row(self, seat: Seat) -> SeatRow:
        """A seat as it is written."""
        told: dict[str, object] = {"since": seat.since, "scale": seat.scale}
        if seat.key in self.stored and seat.at in machine.ENGAGED:
            told["update"] = self.stored[seat.key]
        if seat.why:
            told["why"] = seat.why
        about = json.dumps(told).encode()
        return SeatRow(
            self.name, seat.round, seat.part, seat.attempt, seat.position, seat.key, str(seat.at), about
        )  # fmt: skip

    @staticmethod
    def seat(row: SeatRow) -> Seat:
        """A seat that was written."""
        told = json.loads(row.about)
        return Seat(
            row.key, row.position, row.round, row.attempt, At(row.state), told["since"], told["scale"], row.part,
            told.get("why", ""),
        )  # fmt: skip

    def read(self, state: bytes, rows: list[SeatRow]) -> State:
        """The machine's state as it was written, with the seats that still count."""
        bare = machine.read(state, ())
        here = [self.seat(row) for row in rows]
        found = ((row.key, json.loads(row.about).get("update")) for row in rows)
        self.stored = {key: str(digest) for key, digest in found if digest}
        kept = [
            seat for seat in here
            if (seat.round, seat.part) == (bare.round, bare.part) or (self.rules.flowing and seat.at in machine.ENGAGED)
        ]  # fmt: skip
        return machine.read(state, kept)

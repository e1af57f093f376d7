"""The server's core: messages and the time come in, messages go out.

It is synchronous and deterministic: it opens no socket, reads no clock, and draws keys from a source that it is given.
The very same object runs behind HTTP (``http.py``), in memory (tests), and in the simulation of faults.

*Persist, then act.* An event goes to the pure machine (``protocol/round.py``); what it wants saved is written in one
transaction, which fails if another process leads by now; only then the new state is taken over and anybody is told.
What a step made is computed once; a disk that is full delays it, and nothing is computed or noised a second time.

*What lies where.* Sums and updates lie in memory. In mode ephemeral nothing of them is written but, with at least the
minimum of contributors, a sum encrypted under a key that no disk has (``sealing.py``); after a restart whoever is not
in it is asked to send again. Modes sealed and durable write updates as they come, and remove them when the round ends.

Not here: who somebody is (``identity``), what a round makes (``learning.py``), bytes on their way (``uploads.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from foedus.errors import (
    CheckpointError,
    Code,
    CommitFailed,
    CountedTwice,
    FoedusError,
    MalformedMessage,
    NotNow,
    ProtocolError,
    StaleEpoch,
    StorageError,
    UpdateRefused,
    UploadRefused,
)  # fmt: skip
from foedus.net.blobs import Blobs
from foedus.net.brokers.elsewhere import Elsewhere
from foedus.net.course import EVALUATION, Course
from foedus.net.identity.keys import SigningKey
from foedus.net.identity.signed import Signed, sign
from foedus.net.learning import WHOLE, Gathering, Learning
from foedus.net.masking import Limits, MaskedSum
from foedus.net.sealing import Vault
from foedus.net.served import Keeping
from foedus.net.store import RunRow, Store, Transaction
from foedus.net.uploads import Uploads
from foedus.protocol import blob
from foedus.protocol import round as machine
from foedus.protocol.messages import (
    Accepted,
    Ask,
    Bell,
    Blob,
    CheckIn,
    Closed,
    Confer,
    Decline,
    Event,
    Finished,
    Kind,
    Later,
    Message,
    Place,
    Received,
    Refused,
    Standing,
    Standings,
    Stands,
    StartUpload,
    Submit,
    Turn,
    Why,
    Window,
    sentence,
)  # fmt: skip
from foedus.protocol.round import At, Phase, Seat
from foedus.protocol.secagg.messages import session_of, terms_for
from foedus.record.files import json_line
from foedus.rounds.freight import figures_of, parcel_of
from foedus.rounds.parcel import Parcel
from foedus.rounds.work import Refusal

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
REMEMBERED = 50  # rounds whose seats are kept, so that late askers are told how their uploads stand
SUM_S = 5.0  # seconds between two partial sums on a disk
REFRESH_S = 1.0  # seconds between two looks at who has enrolled
NEVER, UNTOLD = -1, -2  # as a number of examples: has never come; has come, and does not say
GIVEN = 8  # blobs that are kept in memory to be given out


class Who(Protocol):
    """Somebody whom the transport has let in."""

    @property
    def position(self) -> int: ...

    @property
    def name(self) -> str: ...


Watch = Callable[[str, Mapping[str, Any]], None]  # something that happened, for logs and counters


def _unwatched(event: str, told: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a coordinator stands on.

    Attributes:
        store, blobs: where things are written.
        secret: so many random bytes that nobody can guess, e.g. ``secrets.token_bytes``.
        uploads: memory for uploads.
        epoch: of the lease that this process writes under; ``None`` where there is no lease (tests).
        signing: the server's key, under which clients are accepted and models published; ``None``: unsigned (tests).
        watch: is told what happens.
        memory: encrypts partial sums under a key that no disk has; ``None``: they are not written.
        operator: encrypts the keys of rounds, in mode sealed.
        elsewhere: sums that aggregation workers merge, where updates come by a broker.
        pause: the least seconds after which clients come back.
    """

    store: Store
    blobs: Blobs
    secret: Callable[[int], bytes]
    uploads: Uploads = field(default_factory=Uploads)
    epoch: Callable[[], int | None] = lambda: None
    signing: SigningKey | None = None
    watch: Watch = _unwatched
    memory: Vault | None = None
    operator: Vault | None = None
    elsewhere: Elsewhere | None = None
    pause: float = 0.5


class _Given(NamedTuple):
    """A blob that clients may fetch."""

    content: bytes
    course: str


class Coordinator:
    """All the runs of a server.

    Args:
        ground: what it stands on.
        learnings: one per run.
    """

    def __init__(self, ground: Ground, learnings: Sequence[Learning]) -> None:
        self._ground, self.learnings = ground, learnings
        self.uploads = ground.uploads
        self._courses: dict[str, Course] = {}
        self._given: dict[bytes, _Given] = {}
        self._digests: dict[int, bytes] = {}  # by the id of bytes that are given
        self._bells: list[Bell] = []
        self._looked_at = -math.inf
        self._examples: dict[int, int] = {}
        self._shapes: dict[bytes, str] = {}
        self._fixed: dict[bytes, bytes] = {}  # bundles and the like
        self._leftover: set[str] = set()  # blobs that could not be removed yet
        self._told: set[tuple[str, int]] = set()  # who has the model of a run that is over

    def offer(self, content: bytes) -> Blob:
        """Let clients fetch some bytes that never change, such as a bundle."""
        digest = blob.digest_of(content)
        self._fixed[digest] = content
        return Blob(digest=digest, size=len(content))

    # --- beginning

    def check(self) -> None:
        """Whether what is written can be gone on with; before anybody is told that there is a server.

        Raises:
            CheckpointError: a run of the same name was begun as another.
        """
        with self._ground.store.begin() as rows:
            found = [(learning, rows.run(learning.served.name)) for learning in self.learnings]
        for learning, row in found:
            if row is not None:
                _check_same(learning, row)

    def load(self, now: float) -> None:
        """Go on from what is written; called when this process begins to lead.

        Raises:
            CheckpointError: what is written is of another run, or damaged.
        """
        self._courses, self._given, self._shapes, self._digests = {}, {}, {}, {}
        self._look(now, at_once=True)
        for learning in self.learnings:
            for course in (Course.training(learning), Course.evaluating(learning)):
                if course.kind is Kind.TRAIN or learning.served.evaluation.clients:
                    self._courses[course.name] = course
                    self._load(course, now)
        self._tidy()

    def _tidy(self) -> None:
        """Remove blobs that no row names: of a process that died between writing one and naming it."""
        with self._ground.store.begin() as rows:
            found = rows.runs()
            named = {digest for row in found for digest in (row.checkpoint, row.sum)}
            for row in found:
                named |= {json.loads(seat.about).get("update") for seat in rows.seats(row.name)}
        for digest in [digest for digest in self._ground.blobs.digests() if digest not in named]:
            self._discard(digest)

    def _load(self, course: Course, now: float) -> None:
        with self._ground.store.begin() as rows:
            row = rows.run(course.name)
            seats = [] if row is None else rows.seats(course.name)
        if row is None:
            return
        learning = course.learning
        _check_same(learning, row)
        if course.kind is Kind.TRAIN and row.checkpoint:
            learning.restore(self._ground.blobs.get(row.checkpoint))
        course.checkpoint, course.key = row.checkpoint, row.key
        course.state = course.read(row.state, seats)
        if course.kind is Kind.TRAIN and learning.state is not None:  # what the process before knew of late updates
            learning.remember(course.versions())
        self._resume(course, row, now)

    def _resume(self, course: Course, row: RunRow, now: float) -> None:
        """The step that was under way goes on with what of its sum can still be read."""
        state = course.state
        course.begun_at = now
        between = (Phase.IDLE, Phase.OVER)
        masked = course.masks and state.phase not in between  # what was in memory is gone, and cannot be gone on with
        if masked or self._between(course, row) != (state.round, state.part):  # the round begins anew
            course.learning.again()
            again = machine.State(
                Phase.FAILED, state.round, 0, state.attempt, deadline=now, goal=state.goal, opening=state.opening
            )
            course.state = replace(again, places=state.places, cohort=state.cohort)
            return
        summed = self._sum_of(course, row)
        self._step(course, machine.Restarted(now, frozenset(summed)), now)
        self._updates_again(course, now)
        self._ground.watch("resumed", {"run": course.name, "round": state.round, "summed": len(summed)})

    def _between(self, course: Course, row: RunRow) -> tuple[int, int]:
        """The step that can be gone on with: within a round, where edges' models can still be read."""
        state, vault = course.state, self._ground.memory
        sealed = row.sum if course.learning.parts > 1 else ""
        if vault is not None and sealed:
            with suppress(CheckpointError):
                step = course.learning.go_on(vault.open(self._ground.blobs.get(sealed), course.name.encode()))
                course.written = sealed, 0
                return step
        return state.round, 0

    def _sum_of(self, course: Course, row: RunRow) -> set[int]:
        """The partial sum that was written, if it can be read; who is in it."""
        vault = self._ground.memory
        if not row.sum or vault is None or course.kind is not Kind.TRAIN or course.learning.parts > 1:
            return set()
        try:
            content = vault.open(self._ground.blobs.get(row.sum), _about(course.state, course.name))
        except CheckpointError:
            return set()
        course.gathering = course.learning.resumed(content, seats=max(1, course.state.places))
        course.written = row.sum, len(course.gathering.counted)
        return set(course.gathering.counted)

    def _look(self, now: float, *, at_once: bool = False) -> None:
        """Who has enrolled."""
        if not at_once and now - self._looked_at < REFRESH_S:
            return
        self._looked_at = now
        with self._ground.store.begin() as rows:
            clients = rows.clients()
        names = [client.name for client in clients]
        self._examples = {c.position: c.examples if c.revoked_at is None else 0 for c in clients}
        # Who has enrolled and never come is not waited for, as though there were nothing to train on.
        sizes = [{NEVER: 0, UNTOLD: -1}.get(size, size) for _, size in sorted(self._examples.items())]
        for learning in self.learnings:
            learning.enrolled(names, sizes)

    # --- messages

    def handle(self, caller: Who, message: Message, now: float) -> Message:
        """Answer a message.

        Args:
            caller: whom the transport has let in.
            message: what it says.
            now: seconds.

        Raises:
            ProtocolError: it cannot be served.
            StorageError: nothing can be written at the moment; nothing was done.
            StaleEpoch: another process leads.
        """
        match message:
            case CheckIn():
                return self._check_in(caller, message, now)
            case StartUpload():
                return self._start(caller, message, now)
            case Submit():
                return self._submit(caller, message, now)
            case Ask():
                return self._ask(caller, message, now)
            case Confer():
                return self._confer(caller, message, now)
            case Decline():
                course, seat = self._seat(caller, message.key)
                if course is None or seat is None:
                    return _later(Window(after_s=self._ground.pause, until_s=2 * self._ground.pause), "")
                open_still = seat.at in machine.OPEN  # not of an attempt that is over: there may be another by now
                self._step(course, machine.Declined(now, seat.key), now)
                self._drop(course, seat.key)
                slot = None if course.masked is None else course.masked.slot(caller.position)
                if course.masked is not None and slot is not None and open_still:
                    course.masked.gone(slot, now)
                    self._opened(course, now)
                self._session(seat.key, "!", course, ends=True)
                return _later(course.window(now, pause=self._ground.pause), "")
        raise MalformedMessage(f"a server does not answer {type(message).__name__}")

    def tick(self, now: float) -> Sequence[Bell]:
        """Let time pass: deadlines, commits that failed, the next round. What the doorbell is to ring."""
        leftover, self._leftover = self._leftover, set()
        for digest in leftover:
            self._discard(digest)
        for upload in self.uploads.tidy(now=now):
            self._ground.watch("upload given up", {"upload": upload.hex()[:8]})
        failed: list[Exception] = []
        for act in (self._pass, self._idle):
            for course in list(self._courses.values()):
                try:
                    act(course, now)
                except StaleEpoch:
                    raise
                except Exception as error:  # one run's trouble holds up no other
                    failed.append(error)
        if failed:
            raise failed[0]
        bells, self._bells = self._bells, []
        return bells

    def _pass(self, course: Course, now: float) -> None:
        """Let time pass for one run."""
        if course.unwritten:
            self._write(course, tuple(course.state.seats.values()), now)
        self._hurry(course, now)
        self._collect(course, now)
        if course.under_way:
            self._step(course, machine.Tick(now), now)
        if course.masks:
            self._mask(course, now)
        self._keep_sum(course, now)

    def _idle(self, course: Course, now: float) -> None:
        """Between two rounds of a run: begin the next."""
        if course.state.phase is Phase.IDLE and course.kind is Kind.TRAIN:
            self._look(now)
            self._next(course, now)

    def _collect(self, course: Course, now: float) -> None:
        """What workers have merged elsewhere: taken over as a whole once it is enough, or time is up."""
        elsewhere, state = self._ground.elsewhere, course.state
        if elsewhere is None or course.kind is not Kind.TRAIN or state.phase not in (Phase.SELECTING, Phase.TRAINING):
            return
        came = elsewhere.came(course.name, state.round, state.attempt)
        for each in came:
            if each.refused and each.key in course.state.seats and course.state.seats[each.key].at in machine.OPEN:
                self._ground.watch("refused", {"run": course.name, "position": each.position, "code": "other"})
                self._ahead(course, machine.Refused(now, each.key), now)
        merged = {each.key for each in came if not each.refused}
        awaited = state.phase is Phase.SELECTING or any(s.key not in merged for s in state.at(*machine.OPEN))
        if not merged or (len(merged) < state.goal and awaited and now < state.deadline):
            return
        sums, who = elsewhere.whole(course.name, state.round, state.attempt)
        found = [course.learning.resumed(content, seats=max(1, state.places)) for content in sums]
        course.gathering = course.learning.united(found, seats=max(1, state.places))
        for each in who:
            if not each.refused and each.key in course.state.seats:
                self._ahead(course, machine.Started(now, each.key, each.scale), now)
                self._ahead(course, machine.Received(now, each.key), now)

    # --- checking in

    def _check_in(self, caller: Who, message: CheckIn, now: float) -> Message:
        self._known(caller, message, now)
        courses = self._asked_for(message)
        answer: Message | None = None
        for course in courses:
            found = self._offer(course, caller, message, now)
            if isinstance(found, Accepted):
                return found
            answer = found if answer is None or isinstance(answer, Finished) else answer
        assert answer is not None
        return answer

    def _asked_for(self, message: CheckIn) -> list[Course]:
        """The runs that a client may take part in, evaluations first: training waits for them."""
        found = [
            course for course in self._courses.values()
            if message.run in ("", course.learning.served.name)
        ]  # fmt: skip
        if not found:
            raise ProtocolError(f"there is no run {message.run[:80]!r} here", code=Code.UNKNOWN_RUN)
        ready = [c for c in found if c.kind in message.kinds and (c.kind is Kind.TRAIN or c.under_way)]
        ready.sort(key=lambda course: course.kind is Kind.TRAIN)
        return ready or found[:1]

    def _known(self, caller: Who, message: CheckIn, now: float) -> None:
        """Note how many examples a client has, if it says so and that is new."""
        if caller.position not in self._examples:
            self._look(now, at_once=True)
        before = self._examples.get(caller.position, NEVER)
        told = message.examples
        if told is None:
            told = UNTOLD if before == NEVER else before
        if told == before:
            return
        with self._ground.store.begin(self._ground.epoch()) as rows:
            found = rows.client(caller.name)
            if found is None or found.position != caller.position:
                raise ProtocolError(f"nobody called {caller.name!r} is enrolled here", code=Code.FORBIDDEN, fatal=True)
            rows.put_client(found._replace(examples=told))
        self._look(now, at_once=True)

    def _offer(self, course: Course, caller: Who, message: CheckIn, now: float) -> Message:
        """What a run says to somebody who is there."""
        window = course.window(now, pause=self._ground.pause)
        if lacking := set(message.protections) - set(course.protections):
            return _later(window, f"this run does not promise {', '.join(sorted(lacking))}")
        if course.state.phase is Phase.OVER and course.kind is Kind.TRAIN:
            return self._finished(course, caller)
        if self._examples.get(caller.position) == 0:
            return _later(window, "there is nothing to train on")
        if course.kind not in message.kinds:
            return _later(window, f"this run asks for {course.kind}")
        if (
            course.masked is not None and course.masked.slot(caller.position) is None
        ):  # a place that became free is no slot
            return _later(window, "this round lets nobody else in")
        pending = () if course.masks else message.pending  # nothing of a masked sum can be sent again
        came = machine.Came(now, caller.position, self._ground.secret(16), pending)
        for action in self._step(course, came, now):
            match action:
                case machine.Seated(seat, held):
                    return self._accepted(course, seat, held, now)
                case machine.Away(reason):
                    return _later(window, reason)
                case machine.Over():
                    return self._finished(course, caller) if course.kind is Kind.TRAIN else _later(window, "")
        return _later(window, "come back in a moment")

    def _accepted(self, course: Course, seat: Seat, held: bytes | None, now: float) -> Accepted:
        served, state = course.learning.served, course.state
        orders = self._give(self._orders(course, seat), course)
        closes = seat.since + course.rules.deadline_s if course.rules.flowing else state.deadline
        self._session(seat.key, "-", course)
        return self._signed(Accepted(
            run=served.name, round=seat.round, attempt=seat.attempt, kind=course.kind, key=seat.key, orders=orders,
            bundle=course.learning.bundle, target=served.target, position=seat.position, seed=served.seed,
            closes_s=max(0.0, closes - now), minimum=course.rules.minimum, protections=course.protections, held=held,
        ))  # fmt: skip

    def _signed(self, message: Signed) -> Signed:
        signing = self._ground.signing
        return message if signing is None else sign(signing, message)

    def _orders(self, course: Course, seat: Seat) -> bytes:
        learning = course.learning
        if course.kind is Kind.EVALUATE:
            return learning.model()
        if course.rules.flowing and seat.round != learning.step.round:
            return learning.late_orders(seat.round)
        return learning.orders_for(seat.position)

    def _finished(self, course: Course, caller: Who) -> Finished:
        learning = course.learning
        served, state = learning.served, learning.state
        if state is None:
            return self._signed(Finished(run=served.name, model=None))
        model = self._give(learning.model(), course)
        method = served.algorithm.method
        return self._signed(Finished(
            run=served.name, model=model, personal=method is not None and method.personal is not None,
            rounds=state.round, bundle=learning.bundle, target=served.target, seed=served.seed,
            position=caller.position,
        ))  # fmt: skip

    def _give(self, content: bytes, course: Course) -> Blob:
        """Let clients fetch some bytes, as long as they are of interest."""
        digest = self._digests.get(id(content))
        known = None if digest is None else self._given.get(digest)
        if digest is None or known is None or known.content is not content:  # another object may have had this id
            digest = blob.digest_of(content)
            while len(self._given) >= GIVEN * max(1, len(self._courses)):
                gone = self._given.pop(next(iter(self._given)))
                self._digests.pop(id(gone.content), None)
            self._given[digest] = _Given(content, course.name)
            self._digests[id(content)] = digest
        return Blob(digest=digest, size=len(content))

    def blob(self, caller: Who, digest: bytes) -> bytes:
        """Bytes that clients may fetch: orders, models, bundles; sums and updates are never among them.

        Raises:
            ProtocolError: there are no such bytes for them.
        """
        found = self._given.get(digest)
        turns = (course.masked.body(digest, caller.position) for course in self._courses.values() if course.masked)
        if found is None and (turn := next(filter(None, turns), None)) is not None:
            return turn
        if found is None:
            if digest in self._fixed:
                return self._fixed[digest]
            raise ProtocolError(
                "these bytes are not given out, or not any more; check in again", code=Code.UNKNOWN_BLOB
            )
        course = self._courses.get(found.course)
        if course is not None:
            if course.state.phase is Phase.OVER:
                self._told.add((course.name, caller.position))
            for seat in course.state.seats.values():
                if seat.position == caller.position and seat.at in machine.OPEN:
                    self._session(seat.key, "v[", course)
        return found.content

    # --- uploads

    def _seat(self, caller: Who, key: bytes) -> tuple[Course | None, Seat | None]:
        """Whose key it is: that of a seat which still counts.

        Raises:
            ProtocolError: it is somebody else's.
        """
        for course in self._courses.values():
            if (seat := course.state.seats.get(key)) is not None:
                if seat.position != caller.position:
                    raise ProtocolError("this key is not yours", code=Code.UNKNOWN_KEY, fatal=True)
                return course, seat
        return None, None

    def _start(self, caller: Who, message: StartUpload, now: float) -> Message:
        course, seat = self._seat(caller, message.key)
        if course is None or seat is None:
            return Closed(why=Why.LATE, later=self._anytime(now))
        if course.masks:
            if seat.at in machine.OPEN:
                return self._place(course, seat, message, now)
            return Closed(why=Why.ATTEMPT_OVER, later=course.window(now, pause=self._ground.pause))
        scale = course.learning.scale(seat.round) if course.rules.flowing else 1.0
        found = self._may_send(course, seat, now, scale)
        if not isinstance(found, Seat):
            return found if not isinstance(found, Received) else Closed(why=Why.GOAL_REACHED, later=found.later)
        self._session(seat.key, "]", course)
        return self._place(course, found, message, now)

    def _place(self, course: Course, seat: Seat, message: StartUpload, now: float) -> Place:
        """Room for an upload."""
        upload = course.uploads.setdefault(seat.key, self._ground.secret(16))
        offset = self.uploads.open(upload, message.size, owner=seat.position, now=now) if message.size else 0
        return Place(upload=upload, offset=offset, scale=_scale(seat), most=self.uploads.each)

    def _may_send(self, course: Course, seat: Seat, now: float, scale: float = 1.0) -> Seat | Closed | Received:
        """The seat if its upload may go on; or what is said instead."""
        window = course.window(now, pause=self._ground.pause)
        for action in self._step(course, machine.Started(now, seat.key, scale), now):
            match action:
                case machine.Go(found):
                    return found
                case machine.Known():
                    return Received(later=window)
                case machine.Shut(why):
                    self._session(seat.key, "#", course, ends=True)
                    self._drop(course, seat.key)
                    return Closed(why=why, later=window)
                case machine.Away(reason):
                    raise NotNow(reason)
        return Closed(why=Why.LATE, later=window)

    def _submit(self, caller: Who, message: Submit, now: float) -> Message:
        course, seat = self._seat(caller, message.key)
        if course is None or seat is None:
            return Closed(why=Why.LATE, later=self._anytime(now))
        if course.masks:  # an update in the plain is not even looked at
            self._drop(course, seat.key)
            raise UploadRefused("in this run updates are sent in masked sums only: Confer", fatal=True)
        found = self._may_send(course, seat, now, _scale(seat))
        if not isinstance(found, Seat):
            return found
        content = self._content(course, message)
        self._session(seat.key, "+", course)
        try:
            parcel = self._merged(course, found, content)
        except (UpdateRefused, ProtocolError) as error:
            return self._refuse(course, found, error, now)
        finally:
            self._drop(course, seat.key)
        self._kept_update(course, found, content, parcel, now)
        self._session(seat.key, "^", course, ends=True)
        self._ahead(course, machine.Received(now, seat.key), now)
        return Received(later=course.window(now, pause=self._ground.pause))

    def _content(self, course: Course, message: Submit | Confer) -> memoryview:
        """What was uploaded, if it is what was announced.

        Raises:
            UploadRefused: it is not; all is to be sent anew.
        """
        upload = course.uploads.get(message.key)
        if upload is None or upload != message.upload:
            raise ProtocolError("there is no such upload under way; ask for a place first", code=Code.UNKNOWN_UPLOAD)
        content = self.uploads.whole(upload)
        if len(content) != message.size or blob.digest_of(content) != message.digest:
            self._drop(course, message.key)
            raise UploadRefused("other bytes came than were announced; send them again", code=Code.WRONG_DIGEST)
        return content

    def _merged(self, course: Course, seat: Seat, content: memoryview | bytes) -> Parcel | None:
        """Check what came, and merge it.

        Raises:
            UpdateRefused, ProtocolError: it changed nothing.
        """
        given = blob.unpack(content)
        if course.kind is Kind.EVALUATE:
            course.figures[seat.position] = figures_of(given)
            return None
        parcel = parcel_of(given)
        course.learning.take(self._gathering(course), seat.position, parcel, version=seat.round, scale=_scale(seat))
        return parcel

    def _gathering(self, course: Course) -> Gathering:
        if course.gathering is None:
            course.gathering = Gathering(course.learning.step, seats=max(1, course.state.places))
        return course.gathering

    def _refuse(self, course: Course, seat: Seat, error: UpdateRefused | ProtocolError, now: float) -> Refused:
        code = Code.of(error.reason) if isinstance(error, UpdateRefused) else error.code
        if course.kind is Kind.TRAIN:
            nothing = Parcel({}, {}, 0.0, 0)
            self._gathering(course).refused.append((Refusal(seat.position, str(error)), nothing))
        self._ground.watch("refused", {"run": course.name, "position": seat.position, "code": str(code)})
        self._session(seat.key, "#", course, ends=True)
        self._ahead(course, machine.Refused(now, seat.key), now)
        return Refused(code=code, told=sentence(str(error)), later=course.window(now, pause=self._ground.pause))

    def _drop(self, course: Course, key: bytes) -> None:
        if (upload := course.uploads.pop(key, None)) is not None:
            self.uploads.drop(upload)

    def _ask(self, caller: Who, message: Ask, now: float) -> Standings:
        """How uploads stand."""
        entries = tuple(Standing(key=key, state=self._standing(caller, key)) for key in message.keys)
        return Standings(entries=entries, later=self._anytime(now))

    def _standing(self, caller: Who, key: bytes) -> Stands:
        for course in self._courses.values():
            seat = course.state.seats.get(key)
            if seat is not None and seat.position == caller.position:
                return machine.stands(seat, course.state)
        with self._ground.store.begin() as rows:
            row = rows.seat(key)
        if row is None or row.position != caller.position or row.run not in self._courses:
            return Stands.DISCARDED
        return machine.stands(Course.seat(row), self._courses[row.run].state)

    def _anytime(self, now: float) -> Window:
        """When to come back, for nothing in particular."""
        courses = [c for c in self._courses.values() if c.under_way] or list(self._courses.values())
        return min((c.window(now, pause=self._ground.pause) for c in courses), key=lambda window: window.after_s)

    # --- masked sums

    def _confer(self, caller: Who, message: Confer, now: float) -> Message:
        """A client's part in a masked sum, and its next turn."""
        course, seat = self._seat(caller, message.key)
        if course is None or seat is None or not course.masks:
            return Closed(why=Why.LATE, later=self._anytime(now))
        masked, slot = course.masked, None if course.masked is None else course.masked.slot(caller.position)
        answers = message.upload is not None and seat.at in machine.OPEN
        if masked is not None and slot is not None and answers and not masked.answered(slot, message.turn):
            self._session(seat.key, "+", course)
            try:
                masked.take(slot, self._content(course, message), now)
            finally:
                self._drop(course, seat.key)
        self._opened(course, now)  # before anybody, whoever it is, is told a turn
        seat = course.state.seats.get(message.key, seat)
        window = course.window(now, pause=self._ground.pause)
        if seat.at in (At.RECEIVED, At.COUNTED):
            self._session(seat.key, "^", course, ends=True)
            return Received(later=window)
        if seat.at not in machine.OPEN or (masked is not None and slot is None):
            return Closed(why=Why.ATTEMPT_OVER, later=window)
        if masked is None or slot is None or (letter := masked.letter(slot, message.turn)) is None:
            pause = max(self._ground.pause, 0.002 * len(course.state.seats))  # whoever waits asks again
            return _later(Window(after_s=pause, until_s=2 * pause), "others are awaited")
        return Turn(turn=letter.turn, body=letter.body, closes_s=max(0.0, masked.closes - now))

    def _mask(self, course: Course, now: float) -> None:
        """A masked sum begins when nobody else is let in; it goes on, or is over."""
        state = course.state
        if state.phase is Phase.FAILED and state.opening:  # whoever has answered takes part in no other attempt
            self._ground.watch("masked sum lost", {"run": course.name, "round": state.round, "reason": state.reason})
            course.gathering = Gathering(course.learning.step, opened=True)
            course.state = replace(state, phase=Phase.AGGREGATING, opening=False)
            self._commit(course, now)
        elif course.masked is not None:
            course.masked.tick(now)
            self._opened(course, now)
        elif state.phase is Phase.TRAINING:
            self._begin_masks(course, now)

    def _begin_masks(self, course: Course, now: float) -> None:
        """The attempt among those who have a seat now."""
        state, patience = course.state, course.learning.served.each.patience
        seats = sorted(state.at(*machine.OPEN), key=lambda seat: seat.position)
        orders = blob.digest_of(course.learning.orders_for(WHOLE))
        signing = self._ground.signing
        session = session_of(b"" if signing is None else signing.public.raw, course.name)
        try:
            terms = terms_for(
                course.learning.promise, session=session, round=state.round, attempt=state.attempt, model=orders,
                graph=self._ground.secret(32), clients=len(seats),
            )  # fmt: skip
        except FoedusError as error:
            self._step(course, machine.Failed(now, str(error)[:1000]), now)
            return
        limits = Limits(patience, state.deadline - 2 * patience)
        course.masked = MaskedSum(terms, [seat.position for seat in seats], limits, now + patience)

    def _opened(self, course: Course, now: float) -> None:
        """Write down that masks are asked for, before anybody is; take the sum, or that there will be none."""
        masked = course.masked
        if masked is None or course.state.phase not in (Phase.SELECTING, Phase.TRAINING):
            return
        if (masked.opening or masked.total is not None) and not course.state.opening:
            self._step(course, machine.Opening(now), now)
        if masked.total is not None:
            positions = [masked.positions[slot] for slot in masked.survivors]
            sent = [masked.up[slot] for slot in masked.survivors]
            course.learning.reveal(self._gathering(course), positions, masked.total, sent)
            here = [s for s in course.state.at(*machine.OPEN, At.DECLINED) if s.attempt == course.state.attempt]
            keys = [s.key for s in here if s.position in positions]
            self._ahead(course, machine.Summed(now, tuple(keys)), now)
        elif masked.over:
            self._step(course, machine.Failed(now, f"the masked sum failed: {masked.reason}"[:1000]), now)

    # --- the machine

    def _step(self, course: Course, event: machine.Event, now: float) -> Sequence[machine.Action]:
        """Let something happen: write what is to be written, then take it over, then act.

        Raises:
            StorageError, StaleEpoch: it could not be written; nothing has happened.
        """
        state, actions = machine.step(course.state, event, course.rules)
        if saves := [action for action in actions if isinstance(action, machine.Save)]:
            before = course.state
            course.state = state
            try:
                self._write(course, tuple(seat for save in saves for seat in save.seats), now)
            except BaseException:
                course.state = before
                raise
        self._take_over(course, state, actions, now)
        return actions

    def _ahead(self, course: Course, event: machine.Event, now: float) -> None:
        """As :meth:`_step`, of what has happened in memory already: if it cannot be written now, it is written later.
        Until then a restart asks the client to send again."""
        state, actions = machine.step(course.state, event, course.rules)
        course.state = state
        saves = [seat for action in actions if isinstance(action, machine.Save) for seat in action.seats]
        if any(isinstance(action, machine.Save) for action in actions):
            try:
                self._write(course, tuple(saves), now)
            except StorageError as error:
                course.unwritten = True
                self._ground.watch("storage failed", {"run": course.name, "error": str(error)})
        self._take_over(course, state, actions, now)

    def _take_over(
        self, course: Course, state: machine.State, actions: Sequence[machine.Action], now: float
    ) -> None:  # fmt: skip
        phase, course.state = course.state.phase, state
        for action in actions:
            match action:
                case machine.Commit():
                    self._commit(course, now)
                    if course.state.phase is Phase.IDLE and course.kind is Kind.TRAIN:
                        self._next(course, now)
                case machine.Drop():
                    self._forget(course)
                case machine.Seated() if phase is Phase.SELECTING:
                    self._bell(course, Event.OFFER)

    def _write(self, course: Course, seats: Iterable[Seat], now: float) -> None:
        """Write the machine's state and some seats."""
        with self._ground.store.begin(self._ground.epoch()) as rows:
            rows.put_run(self._row(course, now))
            rows.put_seats([course.row(seat) for seat in seats])
        course.unwritten = False

    def _row(self, course: Course, now: float) -> RunRow:
        return RunRow(
            course.name, course.learning.identity(), machine.written(course.state), course.checkpoint,
            course.written[0], course.key, now,
        )  # fmt: skip

    def _forget(self, course: Course) -> None:
        """The sum is gone, and with it what was written of it."""
        course.gathering, course.figures, course.pending, course.masked = None, {}, None, None
        for key in [key for key in course.uploads if course.state.seats.get(key, _NOBODY).at not in machine.OPEN]:
            self._drop(course, key)
        for key in [key for key in course.stored if course.state.seats.get(key, _NOBODY).at not in machine.ENGAGED]:
            self._discard(course.stored.pop(key))
        if course.written[0] and not course.learning.part:
            self._discard(course.written[0])
            course.written = "", 0
        course.wrote_at = 0.0

    def _discard(self, digest: str) -> None:
        """Remove a blob; what cannot be removed now is tried again, and stops nothing."""
        try:
            self._ground.blobs.remove(digest)
        except StorageError as error:
            self._leftover.add(digest)
            self._ground.watch("storage failed", {"run": "", "error": str(error)})

    # --- rounds

    def _next(self, course: Course, now: float) -> None:
        """Begin what is next: an evaluation, a step, or nothing any more."""
        learning = course.learning
        served = learning.served
        evaluation = self._courses.get(course.name + EVALUATION)
        if evaluation is not None and evaluation.under_way:
            return
        if why := learning.over:
            self._finish(course, why, now)
            return
        if learning.state is None:
            if learning.population < served.first:
                return
            learning.begin()
        self._begin(course, now)

    def _begin(self, course: Course, now: float) -> None:
        """A step begins: who is wanted is fixed, and the state before it is written."""
        learning, step = course.learning, course.learning.step
        if not course.checkpoint:
            assert learning.state is not None
            course.checkpoint = self._ground.blobs.put(learning.checkpoint(learning.state, {}))
        if not course.rules.flowing and learning.population < course.rules.minimum:  # they may come back
            return
        wanted = course.wanted()
        learning.remember(course.versions())
        skipped = wanted.cohort is not None and len(wanted.cohort) < course.rules.minimum
        course.begun_at = now
        if skipped:  # drawn so small that it may not be summed up: nobody is asked
            course.gathering = Gathering(step)
            course.state = machine.State(Phase.AGGREGATING, step.round, step.part, 1)
            self._commit(course, now)
            return
        attempt = course.state.attempt if (course.state.round, course.state.part) == step else 0
        self._step(course, machine.Begin(now, step.round, wanted.goal, wanted.places, wanted.cohort, step.part), now)
        if attempt:
            course.state = replace(course.state, attempt=attempt + 1)
        if course.every is not None:
            course.state = replace(course.state, deadline=now + course.every)
        self._bell(course, Event.OFFER)
        self._ground.watch("begun", {"run": course.name, "round": step.round, "wanted": wanted.goal})

    def _hurry(self, course: Course, now: float) -> None:
        """Where the clock decides when a step ends: it goes on to the next tick of it if nothing has come."""
        state = course.state
        if course.every is None or state.phase is not Phase.SELECTING or now < state.deadline:
            return
        if len(state.at(At.RECEIVED)) < course.rules.minimum:
            course.state = replace(state, deadline=now + course.every)

    def _commit(self, course: Course, now: float) -> None:
        """Make of the sum what is to be made; what cannot be written now stays as it is, and is tried again."""
        try:
            if course.kind is Kind.EVALUATE:
                self._evaluated(course, now)
            else:
                self._committed(course, now)
        except StorageError as error:
            self._ground.watch("storage failed", {"run": course.name, "error": str(error)})
        except (StaleEpoch, CountedTwice):
            raise
        except FoedusError as error:
            self._ground.watch("failed", {"run": course.name, "round": course.state.round, "error": str(error)})
            told = f"{type(error).__name__}: {error}"[:1000]
            self._step(course, machine.Failed(now, told), now)

    def _committed(self, course: Course, now: float) -> None:
        learning, step = course.learning, course.learning.step
        asked = sorted({s.position for s in course.state.seats.values() if s.attempt == course.state.attempt})
        if course.pending is None:
            with _own_code():
                course.pending = learning.commit(self._gathering(course), np.array(asked, np.int64))
        made, counted = course.pending, sorted(self._gathering(course).counted)
        checkpoint = course.checkpoint
        if made.line is not None:
            checkpoint = self._ground.blobs.put(learning.checkpoint(made.state, made.kept))
        state, actions = machine.step(course.state, machine.Committed(now), course.rules)
        seats = [seat for action in actions if isinstance(action, machine.Save) for seat in action.seats]
        old, before, kept = course.checkpoint, course.written[0], ("", 0)
        if made.line is None and self._ground.memory is not None:
            kept = self._ground.blobs.put(self._ground.memory.seal(learning.between(made), course.name.encode())), 0
        after = replace(course, state=state, checkpoint=checkpoint, written=kept, key=b"")
        with self._ground.store.begin(self._ground.epoch()) as rows:
            rows.put_run(self._row(after, now))
            rows.put_seats([course.row(seat) for seat in seats])
            if made.line is not None:
                self._record(course, rows, made.line, counted, now)
        learning.settle(made)
        course.state, course.checkpoint, course.key = state, checkpoint, b""
        course.ended(now)
        self._take_over(course, state, [action for action in actions if isinstance(action, machine.Drop)], now)
        course.written = kept
        for gone in {old, before} - {"", checkpoint, kept[0]}:
            self._discard(gone)
        self._bell(course, Event.COMMITTED, round=step.round)
        self._ground.watch(
            "committed", {"run": course.name, "round": step.round, "part": step.part, "counted": len(counted)}
        )  # fmt: skip
        self._evaluate(course, step.round, made.line is not None, now)

    def _record(
        self, course: Course, rows: Transaction, line: Mapping[str, Any], counted: Sequence[int], now: float
    ) -> None:  # fmt: skip
        """A round's lines in the record, who is counted in it, and the audit log."""
        number = line["round"]
        rows.count(course.name, number, counted)
        rows.put_line(course.name, METRICS, number, json_line(dict(line)).decode())
        timing = {"round": number, "seconds": round(max(0.0, now - course.begun_at), 6), "at": round(now, 3)}
        rows.put_line(course.name, TIMINGS, number, json_line(timing).decode())
        rows.note("committed", {"run": course.name, "round": number, "counted": list(counted)}, now)
        rows.forget_seats(course.name, number - REMEMBERED)

    def _finish(self, course: Course, why: str, now: float) -> None:
        """The run is over: everybody is given its model from now on."""
        self._step(course, machine.Stop(now, why), now)
        with self._ground.store.begin(self._ground.epoch()) as rows:
            rows.note("finished", {"run": course.name, "why": why}, now)
        self._bell(course, Event.FINISHED)
        self._ground.watch("finished", {"run": course.name, "why": why})

    # --- evaluation on clients

    def _evaluate(self, course: Course, number: int, whole: bool, now: float) -> None:
        """Ask clients to evaluate the model of a round, if that is due."""
        evaluation = self._courses.get(course.name + EVALUATION)
        if evaluation is None or not whole or not course.learning.due(number):
            return
        wanted = evaluation.wanted()
        evaluation.begun_at, evaluation.figures = now, {}
        evaluation.state = machine.State()
        begin = machine.Begin(now, number, wanted.goal, wanted.places, wanted.cohort)
        self._step(evaluation, begin, now)
        self._bell(evaluation, Event.OFFER)

    def _evaluated(self, course: Course, now: float) -> None:
        """The figures of an evaluation go into the line of its round; nobody's own are written down."""
        with _own_code():
            figures = course.learning.spread([course.figures[p] for p in sorted(course.figures)])
        number, run = course.state.round, course.learning.served.name
        state, actions = machine.step(course.state, machine.Committed(now), course.rules)
        with self._ground.store.begin(self._ground.epoch()) as rows:
            for at, text in rows.lines(run, METRICS, after=number - 1):
                if at == number:
                    rows.put_line(run, METRICS, number, json_line(json.loads(text) | figures).decode())
            rows.put_run(self._row(replace(course, state=state), now))
            rows.put_seats([course.row(s) for a in actions if isinstance(a, machine.Save) for s in a.seats])
        course.ended(now)
        self._take_over(course, state, [action for action in actions if isinstance(action, machine.Drop)], now)
        self._ground.watch("evaluated", {"run": run, "round": number})

    # --- what of a round under way is written

    def _keep_sum(self, course: Course, now: float) -> None:
        """Write the partial sum if enough more are in it than in the last one, sealed under a key that no disk has."""
        gathering, vault = course.gathering, self._ground.memory
        served = course.learning.served
        if gathering is None or vault is None or course.kind is not Kind.TRAIN or course.rules.flowing:
            return
        fresh = len(gathering.counted) - course.written[1]
        least = course.rules.minimum
        due = served.keeping is Keeping.EPHEMERAL and course.state.phase in (Phase.SELECTING, Phase.TRAINING)
        if not due or fresh < least or now - max(course.wrote_at, course.begun_at) < SUM_S:
            return
        if not course.learning.summable or any(found.senders < least for found in gathering.outcomes.values()):
            return
        sealed = vault.seal(course.learning.partial(gathering), _about(course.state, course.name))
        before, course.wrote_at = course.written, now
        course.written = self._ground.blobs.put(sealed), len(gathering.counted)
        try:
            self._write(course, course.state.at(At.RECEIVED), now)
        except StorageError:
            course.written = before
            raise
        if before[0]:
            self._discard(before[0])

    def _kept_update(
        self, course: Course, seat: Seat, content: memoryview, parcel: Parcel | None, now: float
    ) -> None:  # fmt: skip
        """In modes sealed and durable: the update as it came. It is in the sum already: if it cannot be written, a
        restart asks for it again, as in mode ephemeral."""
        keeping = course.learning.served.keeping
        if keeping is Keeping.EPHEMERAL or parcel is None:
            return
        data = bytes(content)
        if keeping is Keeping.SEALED:
            data = self._round_vault(course).seal(data, _about_update(seat, course.name))
        try:
            course.stored[seat.key] = self._ground.blobs.put(data)
            self._write(course, (seat,), now)
        except StorageError as error:
            course.unwritten = True
            self._ground.watch("storage failed", {"run": course.name, "error": str(error)})

    def _round_vault(self, course: Course) -> Vault:
        """The round's own key, made when it is first needed."""
        operator = self._ground.operator
        assert operator is not None, "mode sealed needs an operator's key"
        if not course.key:
            course.key = operator.seal(self._ground.secret(32), course.name.encode())
        return Vault(operator.open(course.key, course.name.encode()))

    def _updates_again(self, course: Course, now: float) -> None:
        """After a restart: merge the updates that are on a disk, so that nobody is asked again."""
        for key, digest in list(course.stored.items()):
            seat = course.state.seats.get(key)
            if seat is None or seat.at is not At.AGAIN or not self._ground.blobs.has(digest):
                continue
            data = self._ground.blobs.get(digest)
            if course.learning.served.keeping is Keeping.SEALED:
                data = self._round_vault(course).open(data, _about_update(seat, course.name))
            try:
                self._merged(course, seat, data)
            except (UpdateRefused, ProtocolError):
                continue
            self._ahead(course, machine.Started(now, key, _scale(seat)), now)
            self._ahead(course, machine.Received(now, key), now)

    # --- what others are told

    def _bell(self, course: Course, event: Event, *, round: int | None = None) -> None:
        goal = max(1, course.state.goal)
        came = min(1.0, len(course.state.at(At.RECEIVED)) / goal)
        number = course.state.round if round is None else round
        self._bells.append(Bell(run=course.learning.served.name, event=event, round=number, progress=came))

    def _session(self, key: bytes, sign: str, course: Course, *, ends: bool = False) -> None:
        """A device session goes on; see ``logs.py``."""
        shape = self._shapes.pop(key, "")
        if not shape.endswith(sign):
            shape += sign
        if not ends:
            self._shapes[key] = shape
            return
        seat = course.state.seats.get(key)
        told = {"run": course.name, "shape": shape, "position": -1 if seat is None else seat.position}
        self._ground.watch("session", told)

    def runs(self) -> list[dict[str, Any]]:
        """How all runs stand."""
        found = []
        for course in self._courses.values():
            if course.kind is not Kind.TRAIN:
                continue
            learning, state = course.learning, course.state
            done = 0 if learning.state is None else learning.state.round
            found.append({
                "run": course.name, "phase": str(state.phase), "round": done, "rounds": learning.served.rounds,
                "attempt": state.attempt, "seated": len(state.at(*machine.ENGAGED)),
                "received": len(state.at(At.RECEIVED)), "goal": min(state.goal, 2**31),
                "clients": learning.population, "wanted": learning.served.first, "reason": state.reason,
                "algorithm": learning.served.algorithm.label,
            })  # fmt: skip
        return found

    def lines(self, run: str, file: str, after: int) -> bytes:
        """Lines of a run's record.

        Raises:
            ProtocolError: there is no such run or file.
        """
        if run not in self._courses or file not in (METRICS, TIMINGS):
            raise ProtocolError(f"there is no {file[:80]!r} of a run {run[:80]!r} here", code=Code.UNKNOWN_RUN)
        with self._ground.store.begin() as rows:
            return "".join(text for _, text in rows.lines(run, file, after)).encode()

    @property
    def all_told(self) -> bool:
        """Whether everybody who took part has the model."""
        for course in self.courses():
            state = course.learning.state
            took_part = [] if state is None else state.paid().tolist()
            if course.state.phase is not Phase.OVER or any((course.name, p) not in self._told for p in took_part):
                return False
        return True

    def record(self, run: str, file: str, after: int) -> list[tuple[int, str]]:
        """Lines of a run's record, by round."""
        with self._ground.store.begin() as rows:
            return rows.lines(run, file, after)

    def evaluating(self, run: str) -> bool:
        """Whether the figures of clients are still coming in."""
        evaluation = self._courses.get(run + EVALUATION)
        return evaluation is not None and evaluation.under_way

    def courses(self) -> list[Course]:
        """The runs, for whoever writes their folders."""
        return [course for course in self._courses.values() if course.kind is Kind.TRAIN]


@contextmanager
def _own_code() -> Iterator[None]:
    """Where code runs that came with the task or the algorithm: a mistake in it ends an attempt of its own run, and
    neither the server nor other runs."""
    try:
        yield
    except FoedusError:
        raise
    except Exception as error:
        raise CommitFailed(f"{type(error).__name__}: {error}") from error


def _check_same(learning: Learning, row: RunRow) -> None:
    if row.identity != learning.identity():
        raise CheckpointError(
            f"the run {row.name!r} was begun with another task, algorithm, cohort or seed. Give those again, or choose "
            "another name or folder"
        )


def _scale(seat: Seat) -> float:
    """What a seat's update counts; 1 as long as nothing else is fixed."""
    return 1.0 if seat.scale is None else seat.scale


_NOBODY = Seat(b"", -1, 0, 0, At.LAPSED)


def _later(window: Window, reason: str) -> Later:
    return Later(after_s=window.after_s, until_s=window.until_s, reason=reason[:1000])


def _about(state: machine.State, run: str) -> bytes:
    """What a partial sum is of."""
    return json.dumps([run, state.round, state.part, state.attempt]).encode()


def _about_update(seat: Seat, run: str) -> bytes:
    return json.dumps([run, seat.round, seat.part, seat.position]).encode()


__all__ = ["Coordinator", "Ground", "Who"]

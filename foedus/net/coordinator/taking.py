"""Updates that come: a place for one, its digest, the gate, the sum, and how it stands.

*Received* is not *counted*: what has been merged lies in memory, and its client keeps it until a model is committed
with it. Where updates come by a broker, sums that others have merged are taken over here.

Not here: bytes on their way (``net/uploads.py``), the gate and sums themselves (``net/learning.py``), masked sums
(``masks.py``).
"""

from __future__ import annotations

from foedus.errors import Code, NotNow, ProtocolError, TooLarge, UpdateRefused, UploadRefused
from foedus.net.coordinator.driver import Driver
from foedus.net.coordinator.ground import Who
from foedus.net.coordinator.safe import Safe, scale_of
from foedus.net.course import Course
from foedus.protocol import blob
from foedus.protocol import round as machine
from foedus.protocol.messages import (
    Ask,
    Closed,
    Confer,
    Kind,
    Message,
    Place,
    Received,
    Refused,
    Standing,
    Standings,
    Stands,
    StartUpload,
    Submit,
    Why,
    sentence,
)  # fmt: skip
from foedus.protocol.round import At, Phase, Seat
from foedus.rounds.freight import figures_of, parcel_of
from foedus.rounds.parcel import Parcel
from foedus.rounds.sizes import BESIDE
from foedus.rounds.work import Refusal


class Taking:
    """Takes updates.

    Args:
        driver: of the runs.
        safe: what is written of updates, where that is wanted.
    """

    def __init__(self, driver: Driver, safe: Safe) -> None:
        self._driver, self._ground, self._safe = driver, driver.ground, safe
        self._uploads = driver.ground.uploads

    # --- uploads

    def start(self, caller: Who, message: StartUpload, now: float) -> Message:
        """A place for an upload; or that it is not wanted any more."""
        course, seat = self._driver.seat(caller, message.key)
        if course is None or seat is None:
            return Closed(why=Why.LATE, later=self._driver.anytime(now))
        if course.masks:
            if seat.at in machine.OPEN:
                return self._place(course, seat, message, now)
            return Closed(why=Why.ATTEMPT_OVER, later=self._driver.window(course, now))
        scale = course.learning.scale(seat.round) if course.rules.flowing else 1.0
        found = self._may_send(course, seat, now, scale)
        if not isinstance(found, Seat):
            return found if not isinstance(found, Received) else Closed(why=Why.GOAL_REACHED, later=found.later)
        self._driver.news.session(seat.key, "]", course)
        return self._place(course, found, message, now)

    def _place(self, course: Course, seat: Seat, message: StartUpload, now: float) -> Place:
        """Room for an upload.

        Raises:
            TooLarge: nobody needs so much for this model.
            NotNow: there is no room at the moment.
        """
        most = self._most(course)
        if message.size > most:
            raise TooLarge(
                f"an upload of {message.size} bytes is announced, and {most} are more than anybody needs for what "
                f"{course.learning.served.name!r} asks for",
                fatal=True,
            )
        upload = course.uploads.setdefault(seat.key, self._ground.secret(16))
        offset = self._uploads.open(upload, message.size, owner=seat.position, now=now) if message.size else 0
        return Place(upload=upload, offset=offset, scale=scale_of(seat), most=most)

    def _most(self, course: Course) -> int:
        """Bytes of one upload: what the model needs, and an eighth of the memory where a method sends channels of its
        own, whose lengths only it knows."""
        if course.kind is Kind.EVALUATE:
            return min(self._uploads.each, BESIDE)
        needed, method = course.learning.upload_bytes, course.learning.served.algorithm.method
        if method is not None and method.sides:
            needed = max(needed, self._uploads.each // 8)
        return min(self._uploads.each, needed)

    def _may_send(self, course: Course, seat: Seat, now: float, scale: float = 1.0) -> Seat | Closed | Received:
        """The seat if its upload may go on; or what is said instead."""
        window = self._driver.window(course, now)
        for action in self._driver.step(course, machine.Started(now, seat.key, scale), now):
            match action:
                case machine.Go(found):
                    return found
                case machine.Known():
                    return Received(later=window)
                case machine.Shut(why):
                    self._driver.news.session(seat.key, "#", course, ends=True)
                    self._driver.drop(course, seat.key)
                    return Closed(why=why, later=window)
                case machine.Away(reason):
                    raise NotNow(reason)
        return Closed(why=Why.LATE, later=window)

    def submit(self, caller: Who, message: Submit, now: float) -> Message:
        """Take an upload that is whole into the sum."""
        course, seat = self._driver.seat(caller, message.key)
        if course is None or seat is None:
            return Closed(why=Why.LATE, later=self._driver.anytime(now))
        if course.masks:  # an update in the plain is not even looked at
            self._driver.drop(course, seat.key)
            raise UploadRefused("in this run updates are sent in masked sums only: Confer", fatal=True)
        found = self._may_send(course, seat, now, scale_of(seat))
        if not isinstance(found, Seat):
            return found
        content = self.content(course, message)
        self._driver.news.session(seat.key, "+", course)
        try:
            parcel = self.merged(course, found, content)
        except (UpdateRefused, ProtocolError) as error:
            return self._refuse(course, found, error, now)
        finally:
            self._driver.drop(course, seat.key)
        self._safe.keep_update(course, found, content, parcel, now)
        self._driver.news.session(seat.key, "^", course, ends=True)
        self._driver.ahead(course, machine.Received(now, seat.key), now)
        return Received(later=self._driver.window(course, now))

    def content(self, course: Course, message: Submit | Confer) -> memoryview:
        """What was uploaded, if it is what was announced.

        Raises:
            UploadRefused: it is not; all is to be sent anew.
        """
        upload = course.uploads.get(message.key)
        if upload is None or upload != message.upload:
            raise ProtocolError("there is no such upload under way; ask for a place first", code=Code.UNKNOWN_UPLOAD)
        content = self._uploads.whole(upload)
        if len(content) != message.size or self._uploads.digest(upload) != message.digest:
            self._driver.drop(course, message.key)
            raise UploadRefused("other bytes came than were announced; send them again", code=Code.WRONG_DIGEST)
        return content

    def merged(self, course: Course, seat: Seat, content: memoryview | bytes) -> Parcel | None:
        """Check what came, and merge it.

        Raises:
            UpdateRefused, ProtocolError: it changed nothing.
        """
        given = blob.unpack(content)
        if course.kind is Kind.EVALUATE:
            course.figures[seat.position] = figures_of(given)
            return None
        if course.kind is Kind.DECRYPT:
            if (handed := course.handed) is None:
                raise NotNow("the sum is not at hand")
            course.answers[seat.position] = course.learning.opened(given, handed.digest, handed.updates, seat.position)
            return None
        parcel = parcel_of(given)
        course.learning.take(course.gathered(), seat.position, parcel, version=seat.round, scale=scale_of(seat))
        return parcel

    def _refuse(self, course: Course, seat: Seat, error: UpdateRefused | ProtocolError, now: float) -> Refused:
        code = Code.of(error.reason) if isinstance(error, UpdateRefused) else error.code
        if course.kind is Kind.TRAIN:
            nothing = Parcel({}, {}, 0.0, 0)
            course.gathered().refused.append((Refusal(seat.position, str(error)), nothing))
        self._ground.watch("refused", {"run": course.name, "position": seat.position, "code": str(code)})
        self._driver.news.session(seat.key, "#", course, ends=True)
        self._driver.ahead(course, machine.Refused(now, seat.key), now)
        return Refused(code=code, told=sentence(str(error)), later=self._driver.window(course, now))

    # --- how they stand

    def ask(self, caller: Who, message: Ask, now: float) -> Standings:
        """How uploads stand."""
        entries = tuple(Standing(key=key, state=self._standing(caller, key)) for key in message.keys)
        return Standings(entries=entries, later=self._driver.anytime(now))

    def _standing(self, caller: Who, key: bytes) -> Stands:
        for course in self._driver.courses.values():
            seat = course.state.seats.get(key)
            if seat is not None and seat.position == caller.position:
                return Stands.PENDING if _still_summed(course, seat) else machine.stands(seat, course.state)
        with self._ground.store.begin() as rows:
            row = rows.seat(key)
        if row is None or row.position != caller.position or row.run not in self._driver.courses:
            return Stands.DISCARDED
        return machine.stands(Course.seat(row), self._driver.courses[row.run].state)

    # --- what was merged elsewhere

    def collect(self, course: Course, now: float) -> None:
        """What workers have merged elsewhere: taken over as a whole once it is enough, or time is up."""
        elsewhere, state = self._ground.elsewhere, course.state
        if elsewhere is None or course.kind is not Kind.TRAIN or state.phase not in (Phase.SELECTING, Phase.TRAINING):
            return
        came = elsewhere.came(course.name, state.round, state.attempt)
        for each in came:
            if each.refused and each.key in course.state.seats and course.state.seats[each.key].at in machine.OPEN:
                self._ground.watch("refused", {"run": course.name, "position": each.position, "code": "other"})
                self._driver.ahead(course, machine.Refused(now, each.key), now)
        merged = {each.key for each in came if not each.refused}
        awaited = state.phase is Phase.SELECTING or any(s.key not in merged for s in state.at(*machine.OPEN))
        if not merged or (len(merged) < state.goal and awaited and now < state.deadline):
            return
        sums, who = elsewhere.whole(course.name, state.round, state.attempt)
        found = [course.learning.resumed(content, seats=max(1, state.places)) for content in sums]
        course.gathering = course.learning.united(found, seats=max(1, state.places))
        for each in who:
            if not each.refused and each.key in course.state.seats:
                self._driver.ahead(course, machine.Started(now, each.key, each.scale), now)
                self._driver.ahead(course, machine.Received(now, each.key), now)


def _still_summed(course: Course, seat: Seat) -> bool:
    """Whether a seat that was given back may be in a masked sum all the same: its numbers came before that."""
    masked, state = course.masked, course.state
    present = seat.attempt == state.attempt and state.phase in (Phase.SELECTING, Phase.TRAINING)
    return seat.at is At.DECLINED and present and masked is not None and masked.slot(seat.position) is not None


__all__ = ["Taking"]

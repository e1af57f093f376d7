"""What of a round under way lies on a disk.

In mode ephemeral nothing of sums and updates is written but, with at least the minimum of contributors, a sum encrypted
under a key that no disk has (``net/sealing.py``); after a restart whoever is not in it is asked to send again. Modes
sealed and durable write updates as they come; they are removed when the round ends.

Not here: what is done with it after a restart (``recovery.py``).
"""

from __future__ import annotations

import json

from foedus.errors import CheckpointError, StorageError
from foedus.net.coordinator.driver import Driver
from foedus.net.course import Course
from foedus.net.sealing import Vault
from foedus.net.served import Keeping
from foedus.net.store import RunRow
from foedus.protocol import round as machine
from foedus.protocol.messages import Kind
from foedus.protocol.round import At, Phase, Seat
from foedus.rounds.parcel import Parcel

SUM_S = 5.0  # seconds between two partial sums on a disk


class Safe:
    """What is written of rounds under way, and read again.

    Args:
        driver: of the runs.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver, self._ground = driver, driver.ground

    def keep_sum(self, course: Course, now: float) -> None:
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
        course.written = self._driver.keep(sealed), len(gathering.counted)
        try:
            self._driver.write(course, course.state.at(At.RECEIVED), now)
        except StorageError:
            course.written = before
            raise
        if before[0]:
            self._driver.discard(before[0])

    def keep_closed(self, course: Course) -> None:
        """Put an encrypted sum that is complete, and about to be opened, where the same transaction names it that says
        so: whoever goes on after a restart has this sum, or none."""
        vault = self._ground.memory
        if vault is None:
            return
        gathering = course.gathered()
        sealed = vault.seal(course.learning.partial(gathering), _about(course.state, course.name))
        course.written = self._driver.keep(sealed), len(gathering.counted)

    def sum_of(self, course: Course, row: RunRow) -> set[int]:
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

    def keep_update(
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
            course.stored[seat.key] = self._driver.keep(data)
            self._driver.write(course, (seat,), now)
        except StorageError as error:
            course.unwritten = True
            self._ground.watch("storage failed", {"run": course.name, "error": str(error)})

    def _round_vault(self, course: Course) -> Vault:
        """The round's own key, made when it is first needed."""
        operator = self._ground.operator
        assert operator is not None, "mode sealed needs an operator's key"
        about = course.name.encode()
        if course.key:
            try:
                return Vault(operator.open(course.key, about))
            except CheckpointError as error:  # of a server with another identity: what lies under it is asked for again
                self._ground.watch("round key lost", {"run": course.name, "error": str(error)})
        course.key = operator.seal(self._ground.secret(32), about)
        return Vault(operator.open(course.key, about))

    def update_of(self, course: Course, seat: Seat, digest: str) -> bytes:
        """An update that was written."""
        data = self._ground.blobs.get(digest)
        if course.learning.served.keeping is Keeping.SEALED:
            data = self._round_vault(course).open(data, _about_update(seat, course.name))
        return data


def scale_of(seat: Seat) -> float:
    """What a seat's update counts; 1 as long as nothing else is fixed."""
    return 1.0 if seat.scale is None else seat.scale


def _about(state: machine.State, run: str) -> bytes:
    """What a partial sum is of."""
    return json.dumps([run, state.round, state.part, state.attempt]).encode()


def _about_update(seat: Seat, run: str) -> bytes:
    return json.dumps([run, seat.round, seat.part, seat.position]).encode()


__all__ = ["Safe", "scale_of"]

"""What a gateway sees of the rounds that a coordinator leads, in the store, and whom it rings for them.

A gateway has the ears of its clients, and the coordinator knows what is new. What the coordinator does is in the store
before anybody is told, so a gateway looks there a few times a second, at one small row for each run; at seats only
where clients are to be called. It goes on whoever leads. Every gateway calls as many of its own clients as there are
places: with several of them some come in vain, and are told when to come back.

Not here: whom a server rings by itself (``rings.py``), how (``doorbell.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from foedus.net.course import EVALUATION, Course
from foedus.net.rings import Calls, Ring, bell, committed
from foedus.net.store import RunRow, Store, Transaction
from foedus.protocol import round as machine
from foedus.protocol.messages import Event
from foedus.protocol.round import Phase, State

LOOK_S = 0.25  # seconds between two looks at the store


class Seen(NamedTuple):
    """A run, or its evaluations, as it was written.

    Attributes:
        name: of its row.
        written: the machine's state, as it lies there.
        state: with the seats of its round, if they were looked at.
    """

    name: str
    written: bytes
    state: State

    @property
    def run(self) -> str:
        """As clients call it."""
        return self.name.removesuffix(EVALUATION)


class Lookout:
    """What has been seen, and what is new.

    Args:
        store: where the coordinator writes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, Seen] = {}
        self._calls: dict[str, Calls] = {}
        self._looked_at = float("-inf")

    def rung(self, now: float) -> Sequence[Ring]:
        """What is to be rung, since this was asked last."""
        if now - self._looked_at < LOOK_S:
            return ()
        self._looked_at = now
        with self._store.begin() as rows:
            return [ring for row in rows.runs() for ring in self._new(row, rows, now)]

    def _new(self, row: RunRow, rows: Transaction, now: float) -> list[Ring]:
        """What is new of a run."""
        before, calls = self._seen.get(row.name), self._calls.setdefault(row.name, Calls())
        found = before
        if found is None or found.written != row.state:
            found = Seen(row.name, row.state, machine.read(row.state, ()))
        self._seen[row.name] = found
        ended = [] if before is None else _ended(before, found, rows)
        quiet = calls.quiet(found.state, now)
        call = calls.due(found if quiet else found._replace(state=_with_seats(found, rows)), now)
        return ended if call is None else [*ended, call]


def _with_seats(seen: Seen, rows: Transaction) -> State:
    """The machine's state with the seats of its step: who has one is not called again."""
    bare = seen.state
    seats = [Course.seat(each) for each in rows.seats(seen.name, since=bare.round)]
    return machine.read(seen.written, [seat for seat in seats if (seat.round, seat.part) == (bare.round, bare.part)])


def _ended(before: Seen, after: Seen, rows: Transaction) -> list[Ring]:
    """What has ended since: a round, for those who were asked in it; a run, for everybody."""
    found, last = [], before.state.round
    ended = before.state.phase in _BUSY and _step(before.state) != _step(after.state)
    if ended and after.name == after.run and rows.counted(after.name, last):
        asked = {seat.position for seat in rows.seats(after.name, since=last) if seat.round == last}
        found.append(committed(after, last, asked))
    over = after.state.phase is Phase.OVER and before.state.phase is not Phase.OVER
    return [*found, Ring(bell(after, Event.FINISHED))] if over else found


_BUSY = (Phase.SELECTING, Phase.TRAINING, Phase.AGGREGATING)


def _step(state: State) -> tuple[int, int] | None:
    """Which step is under way."""
    return (state.round, state.part) if state.phase in _BUSY else None


__all__ = ["Lookout"]

"""The client's machine: every row of its table, and whole runs against the server's machine over a line that loses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from foedus.errors import Code
from foedus.protocol import round as server
from foedus.protocol.messages import (
    Accepted,
    Ask,
    Blob,
    CheckIn,
    Closed,
    Decline,
    Finished,
    Kind,
    Later,
    Place,
    Problem,
    Received,
    Refused,
    Standing,
    Standings,
    Stands,
    StartUpload,
    Submit,
    Why,
    Window,
)
from foedus.protocol.round import At
from foedus.protocol.session import (
    LONGEST_S,
    TABLE,
    Encode,
    Fetch,
    Fetched,
    GaveUp,
    Heard,
    Held,
    Keep,
    Log,
    Lost,
    Made,
    Phase,
    Piece,
    Publish,
    Rename,
    Rest,
    Say,
    Settle,
    State,
    Train,
    Went,
    Woke,
    step,
)

K, L, UPLOAD, DIGEST = bytes(16), b"l" * 16, b"u" * 16, b"d" * 32
SOON = Window(after_s=10.0, until_s=20.0)
ORDERS = Blob(digest=DIGEST, size=4)
ACCEPTED = Accepted(
    run="r", round=3, attempt=1, kind=Kind.TRAIN, key=K, orders=ORDERS, position=0, seed=0, closes_s=60.0
)
PLACE = Place(upload=UPLOAD, chunk=4)
START = State(CheckIn(run="r"))


def run(*events: Any, state: State = START) -> tuple[State, tuple[Any, ...]]:
    actions: tuple[Any, ...] = ()
    for event in events:
        state, actions = step(state, event)
    return state, actions


TRAINED = (Woke(0.0), Heard(1.0, ACCEPTED), Fetched(2.0), Made(3.0, 10, DIGEST))
SENT = (*TRAINED, Heard(4.0, PLACE), Went(5.0, 4), Went(6.0, 8), Went(7.0, 10))


def test_a_session_that_goes_well() -> None:
    said: list[Any] = []
    state = START
    for event in (*SENT, Heard(8.0, Received(later=SOON), draw=0.5)):
        state, actions = step(state, event)
        said += actions
    held = Held(K, 3, 10, DIGEST)
    assert said == [
        Say(CheckIn(run="r")), Fetch(ACCEPTED), Train(ACCEPTED),
        Keep(held), Say(StartUpload(key=K, size=10, digest=DIGEST, version=3)),
        Piece(K, UPLOAD, 0, 4), Piece(K, UPLOAD, 4, 4), Piece(K, UPLOAD, 8, 2),
        Say(Submit(key=K, upload=UPLOAD, size=10, digest=DIGEST)),
        Keep(held._replace(waits=True)), Log("-v[]+^"), Rest(23.0),
    ]  # fmt: skip
    assert state.held[K].waits


def asked(*entries: tuple[bytes, Stands]) -> Heard:
    return Heard(1.0, Standings(entries=tuple(Standing(key=k, state=s) for k, s in entries), later=SOON))


def test_what_is_held_is_asked_for_and_settled() -> None:
    state = State(CheckIn(run="r"), {k: Held(k, 3, 10, DIGEST, waits=True) for k in (K, L)})
    state, actions = run(Woke(0.0), state=state)
    assert actions == (Say(Ask(keys=(K, L))),)
    after, actions = run(asked((K, Stands.COUNTED), (L, Stands.PENDING)), state=state)
    assert actions == (Settle(K, True), Say(CheckIn(run="r", pending=(L,))))
    after, actions = run(asked((K, Stands.DISCARDED), (L, Stands.AGAIN)), state=state)
    assert actions[0] == Settle(K, False)
    assert actions[1:] == (
        Keep(after.held[L]), Say(StartUpload(key=L, size=10, digest=DIGEST, version=3)),
    )  # fmt: skip


def test_after_a_restart_bytes_that_never_arrived_go_first() -> None:
    state = State(CheckIn(run="r"), {K: Held(K, 3, 10, DIGEST, waits=True), L: Held(L, 4, 9, DIGEST)})
    state, (say,) = run(Woke(0.0), state=state)
    assert say.request == StartUpload(key=L, size=9, digest=DIGEST, version=4)
    state, actions = run(Heard(1.0, Closed(why=Why.LATE, later=SOON)), state=state)
    assert (state.phase, state.held[L].waits) == (Phase.RESTING, True)
    assert actions[-1] == Rest(11.0)


def test_a_new_attempt_is_sent_the_same_bytes() -> None:
    state = State(CheckIn(run="r"), {K: Held(K, 3, 10, DIGEST, waits=True)})
    state, _ = run(Woke(0.0), asked((K, Stands.PENDING)), state=state)
    state, actions = run(Heard(2.0, replace(ACCEPTED, key=L, attempt=2, held=K)), state=state)
    assert actions == (
        Rename(K, Held(L, 3, 10, DIGEST)), Say(StartUpload(key=L, size=10, digest=DIGEST, version=3)),
    )  # fmt: skip
    assert list(state.held) == [L]


def test_a_stale_update_is_encoded_anew_or_given_back() -> None:
    state, actions = run(*TRAINED, Heard(4.0, replace(PLACE, scale=0.5)))
    assert actions == (Encode(0.5),)
    state, actions = run(Made(5.0, 8, DIGEST), state=state)
    assert actions[0] == Keep(Held(K, 3, 8, DIGEST, 0.5))
    assert run(Heard(6.0, replace(PLACE, scale=0.5)), state=state)[1] == (Piece(K, UPLOAD, 0, 4),)
    restarted = State(CheckIn(run="r"), {K: Held(K, 3, 10, DIGEST)})
    _, actions = run(Woke(0.0), Heard(1.0, replace(PLACE, scale=0.5)), state=restarted)
    assert actions == (Settle(K, False), Say(Decline(key=K, reason="interrupted")))


def test_who_gives_up_says_so() -> None:
    for events in ((Woke(0.0), Heard(1.0, ACCEPTED)), (Woke(0.0), Heard(1.0, ACCEPTED), Fetched(2.0))):
        state, actions = run(*events, GaveUp(3.0, "rules"))
        assert actions == (Say(Decline(key=K, reason="rules")),)
        state, actions = run(Heard(4.0, Later(after_s=5.0, until_s=6.0)), state=state)
        assert actions[-1] == Rest(9.0)
        assert "!" in actions[0].shape
    assert run(*TRAINED, Heard(4.0, replace(PLACE, most=9)))[1][1] == Say(Decline(key=K, reason="too large"))
    stale = (*TRAINED, Heard(4.0, replace(PLACE, scale=0.5)), GaveUp(5.0, "training"))
    assert run(*stale)[1] == (Settle(K, False), Say(Decline(key=K, reason="training")))


def test_refused_bytes_are_deleted() -> None:
    state, actions = run(*SENT, Heard(8.0, Refused(code=Code.NORM, told="", later=SOON)))
    assert actions == (Settle(K, False), Log("-v[]+#"), Rest(18.0))
    assert not state.held


def test_an_upload_is_resumed_where_the_server_says() -> None:
    state, _ = run(*TRAINED, Heard(4.0, PLACE))
    wrong = Problem(code=Code.WRONG_OFFSET, offset=8)
    assert run(Heard(5.0, wrong), state=state)[1] == (Piece(K, UPLOAD, 8, 2),)
    assert run(Heard(5.0, Problem(code=Code.UNKNOWN_UPLOAD)), state=state)[1][0].request.key == K
    lost, actions = run(Lost(5.0, 1.0), state=state)
    assert actions == (Log("-v[]+!"), Rest(6.0))
    _, (say,) = run(Woke(6.0), state=lost)
    assert say.request == StartUpload(key=K, size=10, digest=DIGEST, version=3)
    _, actions = run(Woke(6.0), Heard(7.0, replace(PLACE, offset=8)), state=lost)
    assert actions == (Piece(K, UPLOAD, 8, 2),)


@pytest.mark.parametrize(
    ("problem", "settled"),
    [
        (Problem(code=Code.UNKNOWN_KEY), True), (Problem(code=Code.TOO_LARGE, fatal=True), True),
        (Problem(code=Code.RATE, after_s=50.0), False), (Problem(code=Code.OTHER), False),
        (Problem(code=Code.WRONG_OFFSET, offset=99), False),
    ],
)  # fmt: skip
def test_problems_while_sending(problem: Problem, settled: bool) -> None:
    state, actions = run(*TRAINED, Heard(4.0, PLACE), Heard(5.0, problem, 0.0))
    assert (Settle(K, False) in actions) == settled
    assert state.phase is Phase.RESTING
    assert actions[-1].until >= 5.0 + max(0.5, problem.after_s)


def test_the_same_trouble_over_and_over_ends_in_waiting() -> None:
    for code in (Code.UNKNOWN_UPLOAD, Code.WRONG_OFFSET):
        state, _ = run(*TRAINED, Heard(4.0, PLACE))
        for _ in range(10):
            if state.phase is Phase.RESTING:
                break
            answer = PLACE if state.phase is Phase.PLACING and code is Code.UNKNOWN_UPLOAD else None
            state, _ = step(state, Heard(5.0, Problem(code=code, offset=0)))
            if answer and state.phase is Phase.PLACING:
                state = replace(state, failures=state.failures)
        assert state.phase is Phase.RESTING


def test_what_cannot_be_reached_is_tried_later_and_later() -> None:
    state, waits = START, []
    for n in range(15):
        state, _ = run(Woke(float(n)), state=state)
        state, actions = run(Lost(0.0, 1.0), state=state)
        waits.append(actions[-1].until)
    assert waits == sorted(waits)
    assert waits[0] == 1.0
    assert waits[-1] == LONGEST_S


def test_a_run_that_is_over() -> None:
    over = Finished(run="r", model=ORDERS)
    state, actions = run(Woke(0.0), Heard(1.0, over))
    assert actions == (Publish(over),)
    assert run(Lost(2.0), Woke(3.0), Heard(4.0, over), state=state)[1] == (Publish(over),)
    state, actions = run(Fetched(2.0), state=state)
    assert (state.phase, actions) == (Phase.OVER, (Log("-^"),))
    assert run(Woke(3.0), state=state) == (state, ())


def test_who_has_the_model_and_still_holds_bytes_asks_at_once_how_they_stand() -> None:
    """The commit came between its question and its check-in, and the server will soon be gone."""
    over, held = Finished(run="r", model=ORDERS), Held(K, 3, 4, DIGEST, waits=True)
    state = State(CheckIn(run="r"), {K: held})
    pending = Heard(1.0, Standings(entries=(Standing(key=K, state=Stands.PENDING),), later=SOON))
    state, actions = run(Woke(0.0), pending, Heard(2.0, over), Fetched(3.0), state=state)
    assert actions == (Say(Ask(keys=(K,))),)
    counted = Heard(4.0, Standings(entries=(Standing(key=K, state=Stands.COUNTED),), later=SOON))
    state, actions = run(counted, state=state)
    assert actions[0] == Settle(K, True)
    assert run(Heard(5.0, over), state=state)[0].phase is Phase.OVER


def test_a_client_of_any_run_has_each_model_once() -> None:
    over = Finished(run="r", model=ORDERS)
    state, _ = run(Woke(0.0), Heard(1.0, over), Fetched(2.0), state=State(CheckIn()))
    state, actions = run(Woke(500.0), Heard(501.0, over), state=state)
    assert state.phase is Phase.RESTING
    assert not any(isinstance(a, Publish) for a in actions)


def test_an_answer_that_makes_no_sense_is_survived() -> None:
    for events in ((Woke(0.0),), TRAINED, SENT):
        state, actions = run(*events, Heard(9.0, Standings(entries=(), later=SOON)))
        assert (state.phase, type(actions[-1])) == (Phase.RESTING, Rest)


def test_every_row_is_one() -> None:
    assert len({(row.phase, row.event) for row in TABLE}) == len(TABLE)
    assert {to for row in TABLE for to in row.to} == set(Phase)


# --- against the server's machine -----------------------------------------------------------------------------


class Line:
    """A server's machine and some clients', with a line between them that loses answers and requests."""

    def __init__(self, seed: int, loss: float) -> None:
        self.random, self.loss, self.now = random.Random(seed), loss, 0.0
        self.rules = server.Rules(minimum=2, window_s=20, deadline_s=60, retry_s=1)
        self.state, self.keys, self.counted = server.State(), 0, []  # type: ignore[var-annotated]
        self.clients = dict.fromkeys(range(4), START)
        self.wakes = dict.fromkeys(self.clients, 0.0)
        self.uploads: dict[bytes, int] = {}

    def feed(self, event: Any) -> tuple[Any, ...]:
        self.state, actions = server.step(self.state, event, self.rules)
        if any(isinstance(a, server.Commit) for a in actions):
            self.counted.append(sorted(self.state.received))
            return actions + self.feed(server.Committed(self.now))
        return actions

    def answer(self, position: int, said: Any) -> Any:
        if isinstance(said, CheckIn):
            self.keys += 1
            made = self.feed(server.Came(self.now, position, self.keys.to_bytes(16, "big"), said.pending))[-1]
            if isinstance(made, server.Seated):
                seat = made.seat
                return replace(ACCEPTED, round=seat.round, attempt=seat.attempt, key=seat.key, held=made.held)
            return Later(after_s=1.0, until_s=3.0)
        if isinstance(said, Ask):
            found = ((k, server.standing(self.state, k) or Stands.DISCARDED) for k in said.keys)
            return Standings(entries=tuple(Standing(key=k, state=s) for k, s in found), later=SOON)
        if isinstance(said, Decline):
            self.feed(server.Declined(self.now, said.key))
            return Later(after_s=1.0, until_s=3.0)
        made = self.feed(server.Started(self.now, said.key))[-1]
        if isinstance(made, server.Known) and isinstance(said, Submit):
            return Received(later=SOON)
        if not isinstance(made, server.Go | server.Known):
            return Closed(why=made.why, later=SOON)
        if isinstance(said, StartUpload):
            return Place(upload=said.key, offset=self.uploads.setdefault(said.key, 0), chunk=4)
        self.feed(server.Received(self.now, said.key))
        return Received(later=SOON)

    def carry_out(self, position: int, action: Any) -> Any:
        """What an action brings, as the next event."""
        lost = self.random.random()
        if isinstance(action, Say | Piece) and lost < self.loss / 2:
            return Lost(self.now, self.random.random())
        found: Any = None
        if isinstance(action, Say):
            found = Heard(self.now, self.answer(position, action.request), self.random.random())
        elif isinstance(action, Piece):
            self.uploads[action.upload] = max(self.uploads[action.upload], action.offset + action.length)
            found = Went(self.now, self.uploads[action.upload])
        elif isinstance(action, Fetch):
            found = Fetched(self.now)
        elif isinstance(action, Train):
            found = GaveUp(self.now, "training") if lost > 0.95 else Made(self.now, 10, DIGEST)
        elif isinstance(action, Rest):
            self.wakes[position] = action.until
        return Lost(self.now, self.random.random()) if found and lost < self.loss else found

    def visit(self, position: int) -> None:
        """One client's steps until it rests; now and then its process dies, and only what it holds is left."""
        todo: list[Any] = [Woke(self.now)]
        while todo:
            self.clients[position], actions = step(self.clients[position], todo.pop())
            todo += [e for e in (self.carry_out(position, a) for a in actions) if e is not None]
            if self.random.random() < self.loss / 10:
                self.clients[position] = replace(START, held=self.clients[position].held)
                self.wakes[position] = self.now + 1
                return
            self.now += 0.01

    def rounds(self, count: int) -> None:
        while len(self.counted) < count:
            if self.state.phase is server.Phase.IDLE:
                self.uploads = {}
                self.feed(server.Begin(self.now, self.state.round + 1, goal=3, places=4))
            position = min(self.wakes, key=lambda p: (self.wakes[p], p))
            self.now = max(self.now, self.wakes[position])
            self.feed(server.Tick(self.now))
            self.visit(position)
            assert self.now < 100_000, "it goes on"


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(10))
def test_rounds_end_over_a_line_that_loses(seed: int, loss: float) -> None:
    line = Line(seed, loss)
    line.rounds(8)
    assert all(len(c) == len(set(c)) >= 2 for c in line.counted)
    for position, client in line.clients.items():  # nobody holds on to more than a few bytes
        assert len(client.held) <= 3, position
    assert {s.at for s in line.state.seats.values()} <= set(At)

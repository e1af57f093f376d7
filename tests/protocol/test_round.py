"""The server's round machine: every row of its table, and what holds after any sequence of events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from foedus.protocol import round as machine
from foedus.protocol.messages import Stands, Why
from foedus.protocol.round import (
    ENGAGED,
    OPEN,
    TABLE,
    At,
    Away,
    Begin,
    Came,
    Commit,
    Committed,
    Declined,
    Drop,
    Failed,
    Go,
    Known,
    Over,
    Phase,
    Received,
    Refused,
    Restarted,
    Rules,
    Save,
    Seated,
    Shut,
    Started,
    State,
    Stop,
    Tick,
    read,
    standing,
    stands,
    step,
    worthwhile_s,
    written,
)

RULES = Rules(minimum=2, window_s=10, deadline_s=100, retry_s=5, attempts=3)
FLOW = replace(RULES, flowing=True)


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def run(*events: Any, state: State | None = None, rules: Rules = RULES) -> tuple[State, tuple[Any, ...]]:
    """The state after some events, and the actions of the last."""
    state, actions = state or State(), ()
    for event in events:
        state, actions = step(state, event, rules)
    return state, actions


BEGIN = Begin(0.0, round=1, goal=3, places=4)
SEATED = (BEGIN, *(Came(1.0, p, key(p)) for p in range(4)))


def of(kind: type, actions: tuple[Any, ...]) -> list[Any]:
    return [a for a in actions if isinstance(a, kind)]


# --- row by row


def test_a_round_that_reaches_its_goal() -> None:
    state, _ = run(*SEATED)
    assert state.phase is Phase.TRAINING  # nobody else can be let in
    state, (go,) = run(Started(2.0, key(0)), state=state)
    assert isinstance(go, Go)
    state, actions = run(*(Received(3.0, key(p)) for p in range(3)), state=state)
    assert state.phase is Phase.AGGREGATING
    assert isinstance(actions[-1], Commit)
    assert run(Started(3.5, key(3)), state=state)[1] == (Shut(Why.GOAL_REACHED),)
    assert isinstance(run(Started(3.5, key(1)), state=state)[1][0], Known)
    state, actions = run(Committed(4.0), state=state)
    assert state.phase is Phase.IDLE
    assert [standing(state, key(p)) for p in range(4)] == [Stands.COUNTED] * 3 + [Stands.DISCARDED]
    assert isinstance(actions[0], Save)
    assert {s.at for s in actions[0].seats} == {At.COUNTED, At.LAPSED}


def test_a_client_that_asks_again_is_given_the_same_seat() -> None:
    state, _ = run(BEGIN, Came(1.0, 7, key(1)))
    again, (seated,) = run(Came(2.0, 7, key(2)), state=state)
    assert (seated.seat.key, seated.held, again) == (key(1), None, state)
    assert run(Came(2.0, 7, key(2), pending=(key(1),)), state=state)[1][0].held == key(1)
    state, _ = run(Received(3.0, key(1)), state=state)
    assert run(Came(4.0, 7, key(3)), state=state)[1] == (Away("this round has had your answer"),)


def test_who_is_turned_away() -> None:
    state, _ = run(replace_begin(cohort=frozenset({1, 2})))
    assert run(Came(1.0, 3, key(3)), state=state)[1] == (Away("others were drawn for this round"),)
    full, _ = run(*SEATED)
    assert run(Came(2.0, 9, key(9)), state=full)[1] == (Away("this round lets nobody else in"),)
    assert run(Came(11.0, 9, key(9)), state=run(BEGIN)[0])[1] == (Away("this round lets nobody else in"),)
    assert run(Came(0.0, 1, key(1)))[1] == (Away("come back in a moment"),)


def replace_begin(**changes: Any) -> Begin:
    return BEGIN._replace(**changes)


def test_a_seat_that_is_declined_is_free_at_once() -> None:
    state, actions = run(*SEATED, Declined(2.0, key(0)))
    assert state.phase is Phase.SELECTING
    assert of(Save, actions)[0].seats[0].at is At.DECLINED
    state, actions = run(Came(3.0, 9, key(9)), state=state)
    assert (state.phase, actions[-1].seat.position) == (Phase.TRAINING, 9)
    assert run(Came(3.0, 0, key(10)), state=state)[1] == (Away("this round has had your answer"),)


def test_the_window_ends() -> None:
    one, _ = run(BEGIN, Came(1.0, 1, key(1)))
    assert run(Tick(9.9), state=one)[0] == one
    failed, actions = run(Tick(10.0), state=one)
    assert (failed.phase, failed.reason) == (Phase.FAILED, "1 client came, and 2 are needed")
    assert isinstance(actions[-1], Drop)
    two, _ = run(Came(2.0, 2, key(2)), Tick(10.0), state=one)
    assert two.phase is Phase.TRAINING


def test_the_deadline_passes() -> None:
    state, _ = run(*SEATED, Received(2.0, key(0)))
    failed, _ = run(Tick(100.0), state=state)
    assert (failed.phase, failed.reason) == (
        Phase.FAILED,
        "the deadline has passed: 1 update came, and 2 are needed",
    )
    enough, actions = run(Received(3.0, key(1)), Tick(100.0), state=state)
    assert (enough.phase, actions[-1]) == (Phase.AGGREGATING, Commit())


def test_nobody_is_left() -> None:
    state, _ = run(*SEATED, Tick(10.0), Received(11.0, key(0)), Declined(12.0, key(1)), Refused(12.0, key(2)))
    assert state.phase is Phase.TRAINING
    assert run(Declined(13.0, key(3)), state=state)[0].phase is Phase.FAILED
    assert run(Received(13.0, key(3)), state=state)[0].phase is Phase.AGGREGATING


def test_a_failed_round_is_tried_again_with_the_same_bytes() -> None:
    state, _ = run(*SEATED, Received(2.0, key(0)), Tick(100.0))
    assert standing(state, key(0)) is Stands.PENDING
    assert run(Started(101.0, key(1)), state=state)[1] == (Shut(Why.ATTEMPT_OVER),)
    assert run(Tick(104.9), state=state)[0] == state
    state, _ = run(Tick(105.0), state=state)
    assert (state.phase, state.attempt, state.deadline) == (Phase.SELECTING, 2, 205.0)
    assert run(Started(106.0, key(1)), state=state)[1] == (Shut(Why.ATTEMPT_OVER),)
    state, actions = run(Came(106.0, 0, key(20), pending=(key(99), key(0))), state=state)
    assert (actions[-1].seat.attempt, actions[-1].held) == (2, key(0))
    state, actions = run(Came(106.0, 1, key(21), pending=(key(0),)), state=state)  # another client's bytes
    assert actions[-1].held is None
    state, _ = run(Received(107.0, key(20)), Received(107.0, key(21)), Tick(205.0), Committed(206.0), state=state)
    assert [standing(state, key(k)) for k in (0, 20)] == [Stands.DISCARDED, Stands.COUNTED]


def test_after_so_many_failures_the_run_is_over() -> None:
    state, _ = run(
        *(e for n in range(3) for e in (*((BEGIN,) if not n else ()), Tick(1000.0 * n + 500), Tick(1000.0 * n + 900)))
    )
    assert state.phase is Phase.OVER
    assert state.reason.startswith("round 1 failed 3 times; the last time: ")
    assert run(Came(1e6, 1, key(1)), state=state)[1] == (Over(state.reason),)
    assert run(Started(1e6, key(1)), state=state)[1] == (Shut(Why.RUN_OVER),)


def test_after_a_restart_whoever_is_not_in_the_sum_sends_again() -> None:
    before, _ = run(*SEATED, Started(2.0, key(0)), Received(3.0, key(0)), Received(3.0, key(1)), Refused(3.0, key(2)))
    state, actions = run(Restarted(500.0, frozenset({1})), state=before)
    assert [standing(state, key(p)) for p in range(4)] == [
        Stands.AGAIN, Stands.PENDING, Stands.DISCARDED, Stands.AGAIN,
    ]  # fmt: skip
    assert state.deadline == 510.0
    assert isinstance(actions[0], Save)
    state, (go,) = run(Started(501.0, key(0)), state=state)
    assert go.seat.key == key(0)
    state, _ = run(Received(502.0, key(0)), Received(503.0, key(3)), state=state)
    assert state.phase is Phase.AGGREGATING


def test_a_commit_that_did_not_come_to_an_end_is_tried_again_or_fails() -> None:
    state, _ = run(*SEATED, *(Received(3.0, key(p)) for p in range(3)))
    assert run(Tick(4.0), state=state)[1] == (Commit(),)
    failed, _ = run(Failed(5.0, "nothing is left after the rule"), state=state)
    assert (failed.phase, standing(failed, key(0))) == (Phase.FAILED, Stands.PENDING)
    found, _ = run(Restarted(5.0), state=state)
    assert (found.phase, standing(found, key(0))) == (Phase.TRAINING, Stands.AGAIN)


def test_seats_of_earlier_rounds_are_judged_from_what_was_written() -> None:
    state, actions = run(*SEATED, *(Received(3.0, key(p)) for p in range(3)), Committed(4.0))
    rows = {s.key: s for s in actions[0].seats}
    state, _ = run(Begin(5.0, round=2, goal=3, places=4), state=state)
    assert standing(state, key(0)) is None
    assert [stands(rows[key(p)], state) for p in (0, 3)] == [Stands.COUNTED, Stands.DISCARDED]


def test_parts_of_a_round_are_told_apart() -> None:
    state, _ = run(*SEATED, Tick(100.0), Tick(105.0))
    other, _ = run(Stop(0.0, "x"), state=state)
    assert other.phase is Phase.OVER
    part, _ = run(*SEATED, *(Received(3.0, key(p)) for p in range(3)), Committed(4.0))
    part, _ = run(Begin(5.0, round=1, goal=3, places=3, part=1), state=part)
    _, actions = run(Came(6.0, 3, key(33), pending=(key(3),)), state=part)
    assert actions[-1].held is None  # what it holds is of the part before


# --- buffered


def test_where_updates_flow_seats_outlive_rounds() -> None:
    state, _ = run(BEGIN._replace(goal=2), *SEATED[1:], rules=FLOW)
    assert state.phase is Phase.SELECTING
    state, actions = run(Started(2.0, key(0), 0.5), state=state, rules=FLOW)
    assert of(Save, actions)[0].seats[0].scale == 0.5
    state, actions = run(Started(3.0, key(0), 0.25), state=state, rules=FLOW)
    assert actions == (Go(state.seats[key(0)]),)
    assert state.seats[key(0)].scale == 0.5  # it is in the bytes
    state, _ = run(Received(4.0, key(0)), Received(4.0, key(1)), Committed(5.0), state=state, rules=FLOW)
    assert [standing(state, key(p)) for p in range(4)] == [Stands.COUNTED] * 2 + [Stands.PENDING] * 2
    state, _ = run(Begin(6.0, round=2, goal=2, places=4), state=state, rules=FLOW)
    assert [standing(state, key(p)) for p in range(4)] == [None] * 2 + [Stands.PENDING] * 2
    state, actions = run(Came(7.0, 0, key(10)), state=state, rules=FLOW)
    assert actions[-1].seat.round == 2
    state, _ = run(Received(8.0, key(2)), state=state, rules=FLOW)
    assert run(Came(9.0, 2, key(12)), state=state, rules=FLOW)[1] == (Away("this round has had your answer"),)


def test_where_updates_flow_seats_lapse_by_themselves_and_rounds_go_on() -> None:
    state, _ = run(BEGIN, Came(1.0, 1, key(1)), Came(60.0, 2, key(2)), Tick(101.0), rules=FLOW)
    assert [s.at for s in state.seats.values()] == [At.LAPSED, At.TRAINING]
    assert (state.phase, state.attempt, state.deadline) == (Phase.SELECTING, 1, 201.0)
    again, actions = run(Came(102.0, 1, key(3), pending=(key(1),)), state=state, rules=FLOW)
    assert (actions[-1].seat.key, actions[-1].held) == (key(1), key(1))  # one key in an attempt
    state, actions = run(Received(103.0, key(2)), Received(104.0, key(1)), Tick(201.0), state=again, rules=FLOW)
    assert (state.phase, actions[-1]) == (Phase.AGGREGATING, Commit())


def test_where_updates_flow_a_restart_within_a_commit_lets_clients_in_again() -> None:
    state, _ = run(BEGIN._replace(goal=2), *SEATED[1:], Received(4.0, key(0)), Received(4.0, key(1)), rules=FLOW)
    assert state.phase is Phase.AGGREGATING
    state, _ = run(Restarted(5.0), Declined(5.5, key(2)), Came(6.0, 9, key(9)), state=state, rules=FLOW)
    assert (state.phase, state.seats[key(9)].at) == (Phase.SELECTING, At.TRAINING)


# --- whatever happens


positions = st.integers(0, 5)
EVENTS = st.one_of(
    st.tuples(st.just("came"), positions, st.booleans()),
    st.tuples(st.sampled_from(["declined", "started", "received", "refused"]), positions, st.booleans()),
    st.tuples(st.just("tick"), st.floats(0, 60), st.booleans()),
    st.tuples(st.sampled_from(["restart", "failed", "committed", "begin"]), positions, st.booleans()),
)


class Driver:
    """A coordinator in miniature: what it wrote, what is in its sum, and who was counted in which round."""

    def __init__(self, rules: Rules, cohort: bool) -> None:
        self.rules, self.state, self.now, self.keys = rules, State(), 0.0, 0
        self.cohort = frozenset({0, 1, 2, 3}) if cohort else None
        self.disk = written(self.state), dict(self.state.seats)
        self.sum: set[int] = set()
        self.summed: set[int] = set()  # as it was written down
        self.counted: list[tuple[int, int]] = []

    def feed(self, event: Any) -> None:
        before = self.state
        self.state, actions = step(before, event, self.rules)
        for i, action in enumerate(actions):
            if isinstance(action, Save):
                assert i == 0, "what is written comes first"
                self.disk = written(self.state), dict(self.state.seats)
            elif isinstance(action, Commit):
                assert len(self.state.at(At.RECEIVED)) >= self.rules.minimum
                assert self.state.received == self.sum
            elif isinstance(action, Drop):
                self.sum, self.summed = set(), set()
            elif isinstance(action, Seated):
                assert action.seat.at in OPEN
                if self.cohort is not None:
                    assert action.seat.position in self.cohort
        self.check(before, event)

    def check_counts(self, state: State) -> None:
        """What is counted as seats move is what there is."""
        seats, all_ = state.seats, list(state.seats.values())
        for states in ((At.RECEIVED,), OPEN, ENGAGED, tuple(At)):
            assert seats.count(*states) == len([s for s in all_ if s.at in states]) == len(state.at(*states))
        for attempt in {s.attempt for s in all_}:
            assert seats.taken(attempt) == len([s for s in all_ if s.attempt == attempt and s.at is not At.LAPSED])
        if self.cohort is not None:
            there = {s.position for s in all_ if s.attempt == state.attempt and s.at is not At.LAPSED}
            assert (seats.taken(state.attempt) >= len(self.cohort)) == (there >= self.cohort)
        for position in range(6):
            assert seats.of(position) == [s for s in all_ if s.position == position]

    def check(self, before: State, event: Any) -> None:
        state = self.state
        engaged = [s.position for s in state.at(*ENGAGED)]
        assert len(engaged) == len(set(engaged)), "one seat a client"
        assert len(engaged) <= max(state.places, len(before.at(*ENGAGED)))
        assert read(written(state), state.seats.values()) == state
        self.check_counts(state)
        if state.phase in (Phase.SELECTING, Phase.TRAINING):
            assert state.received <= self.sum
            if isinstance(event, Tick):
                assert event.now < state.deadline, "no deadline passes unnoticed"
        if not self.rules.flowing and state.phase in (Phase.IDLE, Phase.FAILED, Phase.OVER):
            assert not engaged
        assert worthwhile_s(state, self.now) >= 0

    def seat(self, position: int) -> bytes | None:
        found = [s.key for s in self.state.seats.values() if s.position == position and s.at in OPEN]
        return found[0] if found else None

    def do(self, what: str, value: Any, flag: bool) -> None:
        state = self.state
        if what == "tick":
            self.now += value
            self.feed(Tick(self.now))
        elif what == "came":
            self.keys += 1
            self.feed(Came(self.now, value, key(self.keys), tuple(state.seats) if flag else ()))
        elif what == "begin" and state.phase is Phase.IDLE:
            goal = 4 if self.cohort is not None else 3
            self.feed(Begin(self.now, state.round + 1, goal, 4, self.cohort))
        elif what == "committed" and state.phase is Phase.AGGREGATING:
            self.counted += [(state.round, p) for p in self.sum]
            assert len(self.counted) == len(set(self.counted)), "once a round"
            self.feed(Committed(self.now))
        elif what == "failed":
            self.feed(Failed(self.now, "somebody said so"))
        elif what == "restart":
            self.restart(checkpoint=flag)
        elif what in ("declined", "started", "received", "refused"):
            self.client(what, value)

    def client(self, what: str, position: int) -> None:
        found = self.seat(position)
        if found is None or self.state.phase not in (Phase.SELECTING, Phase.TRAINING):
            return
        if what == "received":
            self.sum.add(position)
        kinds: dict[str, Any] = {"declined": Declined, "started": Started, "received": Received, "refused": Refused}
        self.feed(kinds[what](self.now, found))

    def restart(self, *, checkpoint: bool) -> None:
        """The process dies; another reads what was written."""
        state = read(self.disk[0], self.disk[1].values())
        live = state.phase in (Phase.SELECTING, Phase.TRAINING, Phase.AGGREGATING)
        here = self.state
        same = (state.round, state.attempt) == (here.round, here.attempt)
        self.sum = set(self.sum) if checkpoint and live and same and here.phase is not Phase.IDLE else set()
        engaged = {s.position for s in state.at(*ENGAGED)}
        self.sum &= engaged
        self.state = state
        self.feed(Restarted(self.now, frozenset(self.sum)))


@given(st.lists(EVENTS, min_size=10, max_size=120), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_happens(events: list[Any], flowing: bool, cohort: bool) -> None:
    driver = Driver(FLOW if flowing else RULES, cohort)
    driver.feed(BEGIN._replace(cohort=driver.cohort))
    for event in events:
        driver.do(*event)


def test_every_row_of_the_table_says_what_it_does() -> None:
    assert len({(row.phase, row.event) for row in TABLE}) == len(TABLE)
    reached = {to for row in TABLE for to in row.to}
    assert reached == set(Phase)


def test_a_move_that_is_not_in_the_table_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = machine.Row(Phase.IDLE, Begin, (Phase.OVER,), machine._begin)
    monkeypatch.setitem(machine._ROWS, (Phase.IDLE, Begin), bad)
    with pytest.raises(AssertionError, match="is not in the table"):
        step(State(), BEGIN, RULES)

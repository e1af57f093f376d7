"""A gateway's lookout: from what a coordinator writes it rings as the coordinator does."""

from __future__ import annotations

import foedus as fd
from foedus.net.lookout import LOOK_S, Lookout
from foedus.net.rings import Ring
from foedus.protocol.messages import Accepted, Event

from .federations import Federation
from .test_coordinator import plain_trainee
from .test_learning import OWN


def told(rings: list[Ring]) -> list[tuple[Event, int]]:
    return [(ring.message.event, ring.message.round) for ring in rings]


def test_it_calls_for_a_round_and_tells_of_its_commit_and_of_the_end() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)))
    lookout, heard = Lookout(federation.store), []

    def look() -> list[Ring]:
        federation.tick(LOOK_S)
        found = list(lookout.rung(federation.now))
        heard.extend(found)
        return found

    asked = [position for position, size in enumerate(federation.trainee.clients.sizes) if size]
    assert told(look()) == [(Event.OFFER, 1)]
    first = asked[0]
    accepted = federation.check_in(first)
    assert look() == [], "whoever was called is given some time to come"
    federation.now += 5.0
    (again,) = look()
    assert first in again.but, "who has a seat is not called again"
    assert isinstance(accepted, Accepted)
    federation.send(first, accepted.key, federation.trained(first, accepted))
    for number in (1, 2, 3):
        for position in asked:
            federation.visit(position)
        found = look()
        (committed,) = [ring for ring in found if ring.message.event is Event.COMMITTED]
        assert committed.message.round == number
        assert committed.to == frozenset(asked)
    assert told(heard)[-1] == (Event.FINISHED, 3)
    assert look() == []
    assert {ring.message.run for ring in heard} == {"run"}


def test_a_gateway_that_starts_in_the_middle_calls_and_tells_nothing_old() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)))
    federation.tick()
    for position, size in enumerate(federation.trainee.clients.sizes):
        if size:
            federation.visit(position)
    federation.tick()
    assert told(list(Lookout(federation.store).rung(federation.now))) == [(Event.OFFER, 2)]


def test_it_looks_at_the_store_a_few_times_a_second() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)))
    federation.tick()
    lookout = Lookout(federation.store)
    assert told(list(lookout.rung(federation.now)))
    assert lookout.rung(federation.now + LOOK_S / 2) == ()

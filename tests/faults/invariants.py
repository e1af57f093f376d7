"""What must hold after every step of a server, whatever has happened.

* A client is counted at most once in a round.
* The model that is written is the mean, recomputed here, of what the counted clients hold; never of fewer than the
  minimum, and of nothing that answers other orders.
* What a server said it received is counted in the round that this server commits; after a restart it is asked for
  again, or its attempt was reported failed. No key is ever forgotten.
* Where updates are encrypted, nobody is asked to open a sum that it is not in, that is of fewer than the minimum, or
  that is another one of the same round (``simulation.py``); what a single client says of it is not believed. A sum that
  may have been opened and is lost ends its round with the model as it was.
* A client is told ``counted`` only of what is on the disk, and never told to delete what is counted; until then it
  holds its bytes, and under one key it only ever sends the same.
* Epochs and rounds never go back.
* No deadline passes unnoticed; once nothing goes wrong any more, every round ends, and everybody gets the final model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from foedus.net.store import LEADER, SeatRow
from foedus.protocol import blob
from foedus.protocol.messages import Accepted, Kind, Submit
from foedus.protocol.round import At, Phase

from .simulation import RUN, Client, Server, Violation, World, vector_of

if TYPE_CHECKING:
    from foedus.net.coordinator import Coordinator


class _Bytes(NamedTuple):
    """What is held under a key: whose it is, the update, its weight, and the digest of the orders it was made from."""

    position: int
    vector: Any
    weight: float
    orders: bytes


class _Said(NamedTuple):
    """A server said that it received the update of a key."""

    coordinator: int
    position: int


class Watch:
    """Sees everything, and is seen by nobody."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.vectors: dict[bytes, _Bytes] = {}  # by key
        self.figures: set[bytes] = set()  # keys of evaluations, and of answers to what a sum opens to
        self.sent: dict[bytes, bytes] = {}  # by key: the digest of what was submitted
        self.said: dict[bytes, _Said] = {}
        self.counted: set[bytes] = set()
        self.given: dict[bytes, tuple[int, bytes]] = {}  # by key: to whom, and for which orders
        self.checkpoint, self.round, self.part, self.epoch = "", 0, 0, 0
        self.model: Any = None
        self.lives: dict[int, Coordinator] = {}  # kept alive, so that no two have the same id

    # --- what is seen

    def held(self, client: Client, key: bytes, content: bytes, orders: bytes) -> None:
        """A client holds bytes under a key, made from some orders."""
        if key in self.figures:
            return
        self.vectors[key] = _Bytes(client.position, *vector_of(content), orders)

    def renamed(self, old: bytes, key: bytes) -> None:
        """The bytes of one key are another's from now on."""
        if (old in self.figures) != (key in self.figures):
            raise Violation("an update was taken for figures, or the reverse")
        if key in self.figures:
            return
        self.vectors[key] = self.vectors[old]

    def accepted(self, client: Client, answer: Accepted) -> None:
        """A client was given a key: nobody else ever is, and it is always for the same orders."""
        if answer.kind is not Kind.TRAIN:
            self.figures.add(answer.key)
        given = client.position, answer.orders.digest
        if self.given.setdefault(answer.key, given) != given:
            raise Violation(f"the key of client {self.given[answer.key][0]} was given to {client.position}, or anew")

    def submitted(self, client: Client, request: Submit) -> None:
        """A client says that all its bytes are there."""
        if self.sent.setdefault(request.key, request.digest) != request.digest:
            raise Violation(f"client {client.position} sends other bytes under the same key")

    def received(self, coordinator: Coordinator, client: Client, key: bytes) -> None:
        """A server says Received."""
        if key in self.figures:
            return
        self.lives[id(coordinator)] = coordinator
        self.said[key] = _Said(id(coordinator), client.position)

    def settled(self, client: Client, key: bytes, counted: bool) -> None:
        """A client deletes its bytes."""
        if key in self.figures:  # of an evaluation that nobody answers again nothing but a figure is lost
            return
        found = self._seat(key)
        on_disk = found is not None and found.state == At.COUNTED
        if counted and not on_disk:
            raise Violation(f"client {client.position} was told that its update is counted, and on the disk it is not")
        if on_disk and not counted:
            raise Violation(f"client {client.position} was told to throw away what is counted")

    # --- after every step

    def after(self, server: Server) -> None:
        """Look at the disk, if it has changed."""
        if self.world.disk.changed:
            self.world.disk.changed = False
            self._look(server)

    def _look(self, server: Server) -> None:
        with self.world.disk.rows.begin() as rows:
            lease, row = rows.lease(LEADER), rows.run(RUN)
        if lease is not None:
            if lease.epoch < self.epoch:
                raise Violation(f"the epoch went back from {self.epoch} to {lease.epoch}")
            self.epoch = lease.epoch
        if row is None or row.checkpoint == self.checkpoint:
            return
        self._committed(row.checkpoint, server)

    def _committed(self, checkpoint: str, server: Server) -> None:
        """A new model lies on the disk."""
        if checkpoint not in self.world.disk.blobs:
            raise Violation("the database names a checkpoint that is not there")
        tensors = blob.unpack(self.world.disk.blobs[checkpoint])
        number, vector = json.loads(tensors.told["values"])["round"], tensors.arrays["vector"]
        self.checkpoint, before, self.model = checkpoint, self.model, np.array(vector)
        if before is None:
            if number:
                raise Violation(f"the first checkpoint is of round {number}")
            return
        if number != self.round + 1:
            raise Violation(f"after round {self.round} came round {number}")
        self.round = number
        self._mean(before, number)
        self._nobody_left_out(server)

    def _mean(self, before: Any, number: int) -> None:
        """The model is the mean of the clients that are counted, each once."""
        with self.world.disk.rows.begin() as rows:
            positions = rows.counted(RUN, number)
            seats = [s for s in rows.seats(RUN) if s.state == At.COUNTED and s.key not in self.counted]
        if sorted(s.position for s in seats) != sorted(positions):
            raise Violation(
                f"round {number} counts {sorted(positions)}, and its seats {sorted(s.position for s in seats)}"
            )
        if self.world.original.sealed and not positions:
            self.world.faults["sum lost"] += 1
            if not np.array_equal(self.model, before):
                raise Violation(f"the sum of round {number} is lost, and the model is another")
            return
        if len(positions) < self.world.original.minimum:
            raise Violation(f"round {number} is of {len(positions)} clients only")
        self.counted |= {s.key for s in seats}
        self._check_held(seats, number)
        weights = np.array([self.vectors[s.key].weight for s in seats])
        updates = np.array([self.vectors[s.key].vector for s in seats])
        wanted = before + (weights[:, None] * updates).sum(0) / weights.sum()
        if not np.allclose(self.model, wanted, rtol=0, atol=2e-6 * (1 + np.abs(wanted).max())):
            off = float(np.abs(self.model - wanted).max())
            raise Violation(f"the model of round {number} is off the mean of its {len(seats)} clients by {off:.2g}")

    def _check_held(self, seats: list[SeatRow], number: int) -> None:
        """What is counted is held by its client at this moment, and answers the orders that it was given."""
        for seat in seats:
            found = self.vectors.get(seat.key)
            if found is None or found.position != seat.position:
                raise Violation(f"round {number} counts an update that client {seat.position} never held")
            if seat.key not in self.world.clients[seat.position].disk:
                raise Violation(f"client {seat.position} has deleted what is counted in round {number} only now")
            if found.orders != self.given[seat.key][1]:
                raise Violation(f"round {number} counts an update of client {seat.position} for other orders")

    def _nobody_left_out(self, server: Server) -> None:
        """Whatever the server that commits has said it received is in; of earlier attempts it said that they failed."""
        mine = id(server.coordinator)
        for key in [k for k, said in self.said.items() if said.coordinator == mine and k not in self.counted]:
            found = self._seat(key)
            if found is None or found.state != At.LAPSED or self._is_of_the_last(found):
                raise Violation(f"client {self.said[key].position} heard Received in a round that leaves it out")

    def _is_of_the_last(self, seat: SeatRow) -> bool:
        """Whether a seat is of the attempt that was committed."""
        with self.world.disk.rows.begin() as rows:
            last = max(((s.round, s.attempt) for s in rows.seats(RUN) if s.key in self.counted), default=(0, 0))
        return (seat.round, seat.attempt) == last

    def _seat(self, key: bytes) -> SeatRow | None:
        with self.world.disk.rows.begin() as rows:
            found: SeatRow | None = rows.seat(key)
        return found

    def ticked(self, server: Server) -> None:
        """A tick came to its end: no deadline has passed before it."""
        assert server.coordinator is not None
        state = server.coordinator._driver.courses[RUN].state
        if state.phase in (Phase.SELECTING, Phase.TRAINING) and self.world.now + server.offset > state.deadline:
            raise Violation(f"round {state.round} goes on after its deadline")

    # --- at the end

    def end(self) -> None:
        """The run is over: nothing that was received is forgotten, and everybody has the same model."""
        plan = self.world.original
        if self.round != plan.rounds:
            raise Violation(f"{self.round} of {plan.rounds} rounds were committed")
        for key, said in self.said.items():
            found = self._seat(key)
            if found is None:
                raise Violation(f"the key under which client {said.position} heard Received is forgotten")
            if found.state in (At.TRAINING, At.SENDING, At.RECEIVED, At.REFUSED, At.DECLINED):
                raise Violation(f"client {said.position} heard Received, and its seat is {found.state} in the end")
        for client in self.world.clients:
            if client.disk:
                raise Violation(f"client {client.position} holds {len(client.disk)} uploads after the end")
            vector = blob.unpack(client.model).arrays["vector"]
            if not np.array_equal(vector, self.model):
                raise Violation(f"client {client.position} was given another final model")

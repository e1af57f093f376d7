"""What must hold after every step of a server, whatever has happened.

* A client is counted at most once in a round.
* The model that is written is the mean, recomputed here, of what the counted clients hold; never of fewer than the minimum.
* What a server said it received is counted in the round that this server commits; after a restart it is asked for again,
  or its attempt was reported failed. No key is ever forgotten.
* A client is told ``counted`` only of what is on the disk, and never told to delete what is counted.
* Epochs and rounds never go back.
* Once nothing goes wrong any more, no deadline passes without the round's end, and everybody gets the final model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from foedus.net.store import LEADER, SeatRow
from foedus.protocol import blob
from foedus.protocol.messages import Accepted
from foedus.protocol.round import At, Phase

from .simulation import RUN, TICK_S, Client, Server, Violation, World, vector_of

if TYPE_CHECKING:
    from foedus.net.coordinator import Coordinator

QUIET_S = 40.0  # seconds after the last fault from which on deadlines are to be kept to the tick


class _Said(NamedTuple):
    """A server said that it received the update of a key."""

    coordinator: int
    position: int


class Watch:
    """Sees everything, and is seen by nobody."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.vectors: dict[bytes, tuple[int, Any, float]] = {}  # by key: whose, update, weight
        self.said: dict[bytes, _Said] = {}
        self.counted: set[bytes] = set()
        self.accepted_keys: dict[bytes, int] = {}
        self.checkpoint, self.round, self.part, self.epoch = "", 0, 0, 0
        self.model: Any = None
        self.lives: dict[int, Coordinator] = {}  # kept alive, so that no two have the same id

    # --- what is seen

    def held(self, client: Client, key: bytes, content: bytes) -> None:
        """A client holds bytes under a key."""
        self.vectors[key] = client.position, *vector_of(content)

    def accepted(self, client: Client, answer: Accepted) -> None:
        """A client was given a key: nobody else ever is."""
        if self.accepted_keys.setdefault(answer.key, client.position) != client.position:
            raise Violation(f"one key was given to clients {self.accepted_keys[answer.key]} and {client.position}")

    def received(self, coordinator: Coordinator, client: Client, key: bytes) -> None:
        """A server says Received."""
        self.lives[id(coordinator)] = coordinator
        self.said[key] = _Said(id(coordinator), client.position)

    def settled(self, client: Client, key: bytes, counted: bool) -> None:
        """A client deletes its bytes."""
        found = self._seat(key)
        on_disk = found is not None and found.state == At.COUNTED
        if counted and not on_disk:
            raise Violation(f"client {client.position} was told that its update is counted, and on the disk it is not")
        if on_disk and not counted:
            raise Violation(f"client {client.position} was told to throw away what is counted")

    # --- after every step

    def after(self, server: Server) -> None:
        """Look at the disk, if it has changed; and at the clock."""
        if self.world.disk.changed:
            self.world.disk.changed = False
            self._look(server)
        self._in_time(server)

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
        if len(positions) < self.world.original.minimum:
            raise Violation(f"round {number} is of {len(positions)} clients only")
        self.counted |= {s.key for s in seats}
        unknown = [s.position for s in seats if self.vectors.get(s.key, (-1,))[0] != s.position]
        if unknown:
            raise Violation(f"round {number} counts updates that clients {unknown} never held")
        weights = np.array([self.vectors[s.key][2] for s in seats])
        updates = np.array([self.vectors[s.key][1] for s in seats])
        wanted = before + (weights[:, None] * updates).sum(0) / weights.sum()
        if not np.allclose(self.model, wanted, rtol=0, atol=2e-6 * (1 + np.abs(wanted).max())):
            off = float(np.abs(self.model - wanted).max())
            raise Violation(f"the model of round {number} is off the mean of its {len(seats)} clients by {off:.2g}")

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
            last = max((s.round, s.attempt) for s in rows.seats(RUN) if s.key in self.counted)
        return (seat.round, seat.attempt) == last

    def _seat(self, key: bytes) -> SeatRow | None:
        with self.world.disk.rows.begin() as rows:
            found: SeatRow | None = rows.seat(key)
        return found

    def _in_time(self, server: Server) -> None:
        """No deadline passes unnoticed once all is calm."""
        world, coordinator = self.world, server.coordinator
        if coordinator is None or world.now < 1000.0 + world.original.until + QUIET_S:
            return
        state = coordinator._courses[RUN].state
        late = world.now + server.offset - state.deadline
        if state.phase in (Phase.SELECTING, Phase.TRAINING) and late > 3 * TICK_S:
            raise Violation(f"round {state.round} goes on {late:.0f} s after its deadline")

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

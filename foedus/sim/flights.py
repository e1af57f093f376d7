"""Updates taken as they come, in the simulated world's virtual time: asynchronous and semi-synchronous federation.

So many clients train at any time, each from the model that was the latest when it set out. What becomes of whom, and
when, depends on the devices and the seed alone, not on what is learned; therefore the order of arrivals is worked out
first, and training is carried out when an update enters a step of the server, for all that set out from the same
model together. Nothing waits, and the result is the same as if every client had trained on its own time.

A client sets out again only when its update is in a step, so that it never trains twice from one model.

Not here: staleness and sizes of buffers (``core/timing.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.method import Vectors
from foedus.core.random import generator
from foedus.core.timing import Buffered
from foedus.core.values import State
from foedus.errors import ConfigurationError, NothingToAggregate
from foedus.rounds.state import RunState
from foedus.rounds.untold import stands_for
from foedus.rounds.work import Outcome, Session, union
from foedus.sim.pace import Brought, Ground, Ints
from foedus.sim.world import World, journeys, spent

LOST = 1000  # clients lost in a row, for each that trains at a time, after which the server gives up


@dataclass
class _Air:
    """Who is under way. ``flights`` float64 [F, 6]: when it arrives or is lost, client, model's version, whether it is
    lost, serial number, bytes it was thought to send. ``clock`` float64 [2]: the time, and how many have set out."""

    flights: NDArray[np.float64]
    clock: NDArray[np.float64]
    models: dict[int, tuple[Weights, Vectors]] = field(default_factory=dict)

    def state(self) -> State:
        """As arrays for a checkpoint."""
        arrays: State = {"flights": self.flights, "clock": self.clock}
        for version, (weights, down) in self.models.items():
            arrays |= {f"{version}.vector": weights.vector, f"{version}.buffers": weights.buffers}
            arrays |= {f"{version}.down.{name}": array for name, array in down.items()}
        return arrays

    @staticmethod
    def of(state: State) -> _Air:
        if not state:
            return _Air(np.zeros((0, 6)), np.zeros(2))
        air = _Air(state["flights"].copy(), state["clock"].copy())  # a round that is broken off has changed nothing
        for name in state:
            if name.endswith(".vector"):
                version = name.partition(".")[0]
                begin = f"{version}.down."
                down = {n.removeprefix(begin): a for n, a in state.items() if n.startswith(begin)}
                air.models[int(version)] = Weights(state[name], state[f"{version}.buffers"]), down
        return air


class AsTheyCome:
    """Steps of the server whenever enough updates have come, or every so many seconds."""

    def __init__(self, ground: Ground, timing: Buffered) -> None:
        world, at_once = ground.settings.world, ground.wanted
        if world is None:
            raise ConfigurationError(
                f"{timing.label} takes updates as they come, and without a simulated world nothing takes time. Give "
                "Settings(world=foedus.World(device=foedus.sim.world.phone)), or leave out the timing"
            )
        if at_once is None:
            raise ConfigurationError(
                f"{timing.label} needs to know how many clients train at a time: give cohort= a number"
            )
        _check_world(timing, world)
        most = len(ground.job.clients)
        if timing.size is not None and timing.size > most:
            raise ConfigurationError(
                f"{timing.label} waits for {timing.size} updates from different clients, and there are {most}"
            )
        self._ground, self._timing, self._world, self._at_once = ground, timing, world, at_once

    def round(self, number: int, session: Session, state: RunState) -> Brought:
        air, version = _Air.of(state.timing), number - 1
        air.models[version] = self._ground.sender.sent(state).weights, dict(self._ground.down(state))
        begin = float(air.clock[0])
        arrived, costs, lost = self._until_step(air, version, state)
        outcome, pull = self._merged(arrived, air, session, state)
        wanted = {int(v) for v in air.flights[:, 2]}
        air.models = {v: model for v, model in air.models.items() if v in wanted}
        ages = version - arrived[:, 2]
        world = {"seconds": float(air.clock[0]) - begin, "dropped": lost, "late": 0}
        told = {"staleness": {"mean": float(ages.mean()), "most": int(ages.max())}} if len(ages) else {}
        asked = costs[:, 0].astype(np.int64)
        self._actually_sent(outcome, costs)
        order, totals = np.unique(asked, return_inverse=True)
        summed = np.zeros((len(order), 5))
        np.add.at(summed, totals, costs[:, 1:])
        return Brought(outcome, order, summed, True, world, told, pull, air.state())

    # --- the order of events

    def _until_step(
        self, air: _Air, version: int, state: RunState
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Flights that arrive before the server's next step [K, 6]; the costs of all that ended, a row of client,
        1, bytes up and down, seconds of computation, joules; and how many were lost."""
        timing, lost = self._timing, 0
        arrived: list[NDArray[np.float64]] = []
        costs: list[list[float]] = []
        missed = 0  # since the last arrival
        tick = self._next_tick(float(air.clock[0]))
        while timing.size is None or len(arrived) < timing.size:
            self._set_out(air, version, state, busy=[int(f[1]) for f in arrived])
            if not len(air.flights):
                air.clock[0] = tick if np.isfinite(tick) else air.clock[0]
                break
            first = int(np.lexsort((air.flights[:, 4], air.flights[:, 0]))[0])
            flight = air.flights[first]
            if flight[0] > tick:
                air.clock[0] = tick
                break
            air.clock[0] = flight[0]
            air.flights = np.delete(air.flights, first, axis=0)
            costs.append(self._cost(flight, state))
            if flight[3]:
                lost, missed = lost + 1, missed + 1
                if missed > LOST * self._at_once:
                    raise NothingToAggregate(self._given_up(missed, len(arrived)), round=version + 1)
            else:
                arrived.append(flight)
                missed = 0
        return np.reshape(arrived, (-1, 6)), np.reshape(costs, (-1, 6)), lost

    def _given_up(self, missed: int, arrived: int) -> str:
        waiting = f", while {arrived} of {self._timing.size} updates have come" if self._timing.size else ""
        return (
            f"{missed} clients in a row were lost in the simulated world{waiting}. A client takes part again only once "
            "its update is in a step: give a smaller buffer, devices that are lost less often, or more clients"
        )

    def _next_tick(self, now: float) -> float:
        """When the server's next step is due by the clock."""
        every = self._timing.seconds
        return float("inf") if every is None else float((np.floor(now / every + 1e-9) + 1) * every)

    def _set_out(self, air: _Air, version: int, state: RunState, *, busy: list[int]) -> None:
        """Let clients set out until so many are under way as are to be, or no client is free."""
        while len(air.flights) < self._at_once:
            taken = {*busy, *air.flights[:, 1].astype(int).tolist()}
            client = self._free(version + 1, int(air.clock[1]), taken)
            if client is None:
                return
            serial = int(air.clock[1])
            load = self._ground.load(version + 1, state, np.array([client]))
            going = journeys(self._world, np.array([client]), load, seed=self._ground.job.seed, number=serial)
            row = [air.clock[0] + going.ended[0], client, version, float(going.dropped[0]), serial, load.up]
            air.flights = np.vstack([air.flights, row])
            air.clock[1] += 1

    def _free(self, number: int, serial: int, taken: set[int]) -> int | None:
        """A client that is not busy and has data, all equally likely; None if there is none."""
        clients = self._ground.job.clients.at(number)
        sizes, count = clients.sizes, len(clients)
        draw = generator(self._ground.job.seed, "set out", serial)
        for _ in range(100):  # nearly always the first
            client = int(draw.integers(count))
            if client not in taken and (sizes is None or sizes[client]):
                return client
        free = np.ones(count, bool) if sizes is None else sizes > 0
        free[list(taken)] = False
        left = np.flatnonzero(free)
        return int(left[draw.integers(len(left))]) if len(left) else None

    def _cost(self, flight: NDArray[np.float64], state: RunState) -> list[float]:
        client, serial, lost = int(flight[1]), int(flight[4]), bool(flight[3])
        load = self._ground.load(int(flight[2]) + 1, state, np.array([client]))._replace(up=int(flight[5]))
        going = journeys(self._world, np.array([client]), load, seed=self._ground.job.seed, number=serial)
        found = spent(going, load, going.ended, np.array([not lost]))
        return [
            client,
            1,
            float(found.up[0]),
            float(found.down[0]),
            float(found.compute[0]),
            float(found.energy[0]),
        ]

    # --- what they bring

    def _merged(
        self, arrived: NDArray[np.float64], air: _Air, session: Session, state: RunState
    ) -> tuple[Outcome, Weights | None]:
        """The updates of a step, and what pulls the present model towards those that the updates started from: where
        models are mixed the parameters, and always the buffers, whose statistics are averaged, never added up."""
        ground, now, mixing = self._ground, state.round, self._timing.mixing
        outcomes: list[Outcome] = []
        pull = Weights(np.zeros(len(state.weights.vector)), np.zeros(len(state.weights.buffers)))
        total = 0
        for version in np.unique(arrived[:, 2]).astype(int).tolist():
            cohort: Ints = np.sort(arrived[arrived[:, 2] == version, 1].astype(np.int64))
            weights, down = air.models[version]
            scale = self._timing.staleness.weight(now - version) * (1.0 if mixing is None else mixing)
            orders = replace(ground.orders(version + 1, state, cohort), start=weights, down=down, scale=scale, part=0)
            found = ground.bring(session, orders, state)
            weight = stands_for(ground.job.algorithm, found)
            if mixing is not None:
                pull.vector[:] += scale * weight * (weights.vector.astype(np.float64) - state.weights.vector)
            pull.buffers[:] += scale * weight * (weights.buffers.astype(np.float64) - state.weights.buffers)
            total += weight
            outcomes.append(found)
        share = Weights(pull.vector / max(total, 1), pull.buffers / max(total, 1))
        return union(ground.job, outcomes), share if total else None

    def _actually_sent(self, outcome: Outcome, costs: NDArray[np.float64]) -> None:
        """Bytes that were foretold, replaced by those that were sent."""
        sent = dict(zip(outcome.clients, outcome.sent, strict=True))
        for row in costs[::-1]:
            row[2] = sent.pop(int(row[0]), row[2])


def _check_world(timing: Buffered, world: World) -> None:
    """Refuse rules of a world that are about rounds which wait for a cohort."""
    rules = {
        "deadline": world.deadline is not None,
        "over_selection": world.over_selection != 1,
        "minimum": world.minimum != 1,
        "partial_work": world.partial_work,
    }
    if told := [name for name, given in rules.items() if given]:
        raise ConfigurationError(
            f"World({told[0]}=...) is about rounds that wait for a cohort, and {timing.label} waits for nobody. Leave "
            "it out"
        )

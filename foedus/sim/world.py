"""Simulated worlds: how fast, how reliable and how hungry the clients are, in virtual time.

A :class:`World` gives every client a :class:`Device` (a function of the seed and the client) and every round a
deadline; from the work each client has to do it follows who drops out, who comes too late, and what the round
costs in seconds, bytes and joules. Nothing sleeps: a week of a fleet of phones is simulated as fast as it trains.

Not here: who sets out when (``sim/pace.py``, ``sim/flights.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.random import generator
from foedus.errors import ConfigurationError, FoedusError

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64


class Device(NamedTuple):
    """One client's machine.

    Attributes:
        speed: training examples per second.
        download, upload: bytes per second.
        watts: power while training.
        joules_per_byte: energy of the radio or network.
        dropout: the chance that it is lost during a round, in [0, 1].
    """

    speed: float
    download: float
    upload: float
    watts: float = 0.0
    joules_per_byte: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class World:
    """A population of devices and the rules of a round.

    Attributes:
        device: generator → :class:`Device`; called once per client with that client's own random generator.
        deadline: seconds after which a round closes; later updates are lost. ``None`` waits for everybody.
        over_selection: how many times the wanted cohort is asked; the round closes when the wanted number has
            answered, and the rest is cancelled (Bonawitz et al. 2019 ask 1.3 times).
        minimum: fewest answers for a round to count; with fewer, the model stays as it is.
        partial_work: clients that would be late make as many local steps as they can before the deadline, instead
            of being lost. Plain averaging then leans towards fast clients; ``fednova`` weighs them rightly.

    Example:
        >>> World(device=phone, deadline=120.0, over_selection=1.3).label
        'World(device=phone, deadline=120.0, over_selection=1.3, minimum=1)'
    """

    device: Callable[[np.random.Generator], Device]
    deadline: float | None = None
    over_selection: float = 1.0
    minimum: int = 1
    partial_work: bool = False

    def __post_init__(self) -> None:
        if not callable(self.device):
            raise ConfigurationError(
                "device is a function from a random generator to a Device, e.g. foedus.sim.world.phone, so that every "
                f"client has one of its own; not {self.device!r}"
            )
        check_number("over_selection", self.over_selection)
        if self.over_selection < 1:
            raise ConfigurationError(f"over_selection must be a number of at least 1, not {self.over_selection}")
        if self.deadline is not None:
            check_number("deadline", self.deadline, also=", in seconds, or None", above=True)
        if self.partial_work and self.deadline is None:
            raise ConfigurationError("World(partial_work=True) needs a deadline, in seconds, to stop training at")
        check_whole("minimum", self.minimum)

    @property
    def label(self) -> str:
        """What is known of the world by name; the same in every process."""
        device = getattr(self.device, "__qualname__", type(self.device).__name__)
        return (
            f"World(device={device}, deadline={self.deadline}, over_selection={self.over_selection}, "
            f"minimum={self.minimum}{', partial_work=True' * self.partial_work})"
        )


def phone(draw: np.random.Generator) -> Device:
    """A smartphone: 100 examples a second give or take a factor of two, mobile or home network, 3 W, 8 % lost.

    The dropout rate is within the 6–10 % that Bonawitz et al. 2019 report; the rest are round figures.
    """
    speed, down, up = np.exp(draw.normal(np.log([100.0, 2.5e6, 8e5]), [0.7, 0.6, 0.6]))
    return Device(float(speed), float(down), float(up), watts=3.0, joules_per_byte=5e-6, dropout=0.08)


def silo(draw: np.random.Generator) -> Device:
    """A hospital's or bank's server: 5000 examples a second, 100 Mbit/s, 300 W, hardly ever lost."""
    speed, down, up = np.exp(draw.normal(np.log([5000.0, 1.25e7, 1.25e7]), [0.3, 0.2, 0.2]))
    return Device(float(speed), float(down), float(up), watts=300.0, joules_per_byte=1e-6, dropout=0.005)


class Load(NamedTuple):
    """What a round asks of clients: bytes down and up of each; training examples to process and local steps, [C]."""

    down: int
    up: int
    examples: NDArray[np.int64]
    steps: NDArray[np.int64] | None = None


class Passage(NamedTuple):
    """How a round went in the simulated world.

    Attributes:
        counted: bool [C], whose update is in the sum.
        dropped, late: bool [C], who was lost, and who came after the deadline or after the goal was reached. A
            client without data is none of the three: it sends nothing.
        seconds: how long the round took.
        compute: float [C], seconds of computation of each client, wasted ones included.
        energy: float [C], joules.
        up, down: int [C], bytes.
        limits: int [C], local steps that each makes, where the world lets slow clients do less; else ``None``.
    """

    counted: NDArray[np.bool_]
    dropped: NDArray[np.bool_]
    late: NDArray[np.bool_]
    seconds: float
    compute: NDArray[np.float64]
    energy: NDArray[np.float64]
    up: NDArray[np.int64]
    down: NDArray[np.int64]
    limits: NDArray[np.int64] | None = None


class Journeys(NamedTuple):
    """What becomes of clients that set out for a round, each by itself; float [C] in seconds unless said.

    Attributes:
        received: until the model has arrived.
        training: how long training takes.
        finish: until the update has been sent.
        dropped: bool, who is lost on the way.
        ended: until it is lost, or has finished.
        upload: bytes per second.
        watts, per_byte: power while training, energy per byte.
    """

    received: NDArray[np.float64]
    training: NDArray[np.float64]
    finish: NDArray[np.float64]
    dropped: NDArray[np.bool_]
    ended: NDArray[np.float64]
    download: NDArray[np.float64]
    upload: NDArray[np.float64]
    watts: NDArray[np.float64]
    per_byte: NDArray[np.float64]


def journeys(
    world: World, clients: Int64[NDArray[np.int64], " client"], load: Load, *, seed: int, number: int
) -> Journeys:
    """The journeys of some clients; ``number`` tells a client's journeys apart (a round).

    Raises:
        ConfigurationError: a device is none that could be: without speed, or with a dropout above 1.
    """
    devices = [_made(world, int(c), seed) for c in clients]
    speed, download, upload, watts, per_byte, chance = (
        np.array([getattr(d, f) for d in devices], np.float64) for f in Device._fields
    )  # each [client]
    training = load.examples / speed
    received = load.down / download
    finish = received + training + load.up / upload
    draws = [generator(seed, "fate", number, int(c)).random(2) for c in clients]
    fate, moment = np.array(draws, np.float64).reshape(-1, 2).T
    dropped = fate < chance
    # A lost client stops at a random moment of its work.
    ended = np.where(dropped, moment * finish, finish)
    return Journeys(received, training, finish, dropped, ended, download, upload, watts, per_byte)


class Spent(NamedTuple):
    """What journeys cost that stop at some time: seconds of computation and joules, float [C]; bytes, int [C]."""

    compute: NDArray[np.float64]
    energy: NDArray[np.float64]
    up: NDArray[np.int64]
    down: NDArray[np.int64]


def spent(going: Journeys, load: Load, stopped: NDArray[np.float64], counted: NDArray[np.bool_]) -> Spent:
    """What clients have spent when they stop after so many seconds [C]; those that are counted have sent it all."""
    idle = load.examples == 0
    compute = np.clip(stopped - going.received, 0, going.training)
    sent = np.clip((stopped - going.received - going.training) * going.upload, 0, load.up)
    up = np.where(counted, load.up, sent) * ~idle
    down = np.where(stopped >= going.received, load.down, np.minimum(load.down, stopped * going.download))
    energy = compute * going.watts + (up + down) * going.per_byte
    return Spent(compute, energy, up.astype(np.int64), down.astype(np.int64))


def pass_round(
    world: World,
    clients: Int64[NDArray[np.int64], " client"],
    load: Load,
    *,
    goal: int,
    seed: int,
    round: int,
) -> Passage:
    """One round in virtual time: who is counted, and what it cost.

    Args:
        world: the world.
        clients: int64 [C], positions of the clients asked.
        load: what each has to do.
        goal: the round closes when so many have answered.
        seed, round: randomness is counted by them and the client.

    Raises:
        ConfigurationError: a device is none that could be: without speed, or with a dropout above 1.
    """
    going = journeys(world, clients, load, seed=seed, number=round)
    limits = None
    if world.partial_work and world.deadline is not None:
        going, limits = _shortened(going, load, world.deadline)
    # One with nothing to train on sends nothing, and does not count as an answer.
    idle = (load.examples == 0) | (np.zeros(len(clients), bool) if limits is None else limits == 0)
    answers = np.where(going.dropped | idle, np.inf, going.finish)
    closing = _closing(answers, goal, world.deadline, last=float(going.ended.max(initial=0.0)))
    counted = answers <= closing
    counted &= np.cumsum(counted[order := np.argsort(answers, kind="stable")])[np.argsort(order)] <= goal
    cost = spent(going, load, np.minimum(going.ended, closing), counted)
    late = ~counted & ~going.dropped & (load.examples > 0)
    return Passage(counted, going.dropped, late, closing, *cost, limits)


def _shortened(going: Journeys, load: Load, deadline: float) -> tuple[Journeys, NDArray[np.int64]]:
    """Journeys of clients that stop training in time to send, and how many local steps each then makes, [C]."""
    left = deadline - (going.finish - going.training)  # for training
    assert load.steps is not None
    share = np.clip(left / np.maximum(going.training, 1e-300), 0.0, 1.0)
    limits = np.floor(share * load.steps * (1 + 1e-12)).astype(np.int64)
    training = going.training * limits / np.maximum(load.steps, 1)
    finish = going.finish - going.training + training
    return going._replace(training=training, finish=finish, ended=np.minimum(going.ended, finish)), limits


def _closing(
    answers: Float64[NDArray[np.float64], " client"], goal: int, deadline: float | None, *, last: float
) -> float:
    """When the round closes: at the goal's answer, else at the deadline, else at the last sign of a client."""
    ordered = np.sort(answers)
    reached = float(ordered[goal - 1]) if goal <= len(ordered) else float("inf")
    if deadline is not None:
        return min(reached, deadline)
    return reached if np.isfinite(reached) else last


def _made(world: World, client: int, seed: int) -> Device:
    """A client's device, checked."""
    try:
        device = world.device(generator(seed, "device", client))
    except FoedusError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"World(device=...) failed for the client at position {client}: {type(error).__name__}: {error}"
        ) from error
    return _possible(device)


def _possible(device: Any) -> Device:
    if not isinstance(device, Device):
        raise ConfigurationError(
            "World(device=...) returns a foedus.sim.world.Device(speed=..., download=..., upload=...), and returned "
            f"{device!r}"
        )
    positive = all(0 < rate < np.inf for rate in device[:3])
    if not (positive and all(0 <= cost < np.inf for cost in device[3:5]) and 0 <= device.dropout <= 1):
        raise ConfigurationError(
            f"no device can be {device!r}: speed, download and upload are above 0, watts and joules_per_byte at "
            "least 0, and dropout is a chance from 0 to 1"
        )
    return device

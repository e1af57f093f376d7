"""The state of a run between two rounds, and its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.values import State
from foedus.record import Checkpoint

COSTS = ("rounds", "bytes_up", "bytes_down", "compute_seconds", "energy_joules")


@dataclass
class RunState:
    """Everything that the next round depends on, and the totals.

    ``costs`` float64 [population, 5] are each client's totals, see ``COSTS``; memory that nobody wrote to takes no
    room, so that a million clients cost what the few that ever took part do. ``spent`` are those who said that they
    train no more, since what single examples may cost is spent.
    """

    round: int
    weights: Weights
    server: State
    aggregator: State
    buffers: State
    method: State = field(default_factory=dict)
    watch: State = field(default_factory=dict)  # scores so far, and the model's last movement
    timing: State = field(default_factory=dict)  # who is under way, where updates come at their own time
    privacy: State = field(default_factory=dict)  # the ledger of what was released, where there is a budget
    sides: dict[str, State] = field(default_factory=dict)  # of the method's aggregators, by channel
    costs: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(COSTS))))
    simulated_seconds: float = 0.0
    sent: int = 0  # bytes of a client's last messages, on average; 0 before there were any
    barren: int = 0  # updates refused in a row, since one was let in
    stopped: str | None = None
    spent: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def checkpoint(self, identity: str, executor: str) -> Checkpoint:
        arrays: dict[str, NDArray[Any]] = {"vector": self.weights.vector, "buffers": self.weights.buffers}
        for part in ("server", "aggregator", "buffers", "method", "timing", "watch", "privacy"):
            arrays |= {f"{part}.{name}": array for name, array in getattr(self, part).items()}
        for channel, state in self.sides.items():
            arrays |= {f"sides.{channel}/{name}": array for name, array in state.items()}
        arrays["spent"] = self.spent
        arrays["costs.clients"] = self.paid()
        arrays["costs.totals"] = self.costs[arrays["costs.clients"]]
        return Checkpoint(
            arrays,
            {
                "round": self.round, "simulated_seconds": self.simulated_seconds, "stopped": self.stopped,
                "sent": self.sent, "barren": self.barren,
                "identity": identity, "executor": executor,
            },
        )  # fmt: skip

    def paid(self) -> NDArray[np.int64]:
        """Positions of the clients that ever took part."""
        return np.flatnonzero(self.costs[:, 0])

    @staticmethod
    def restored(saved: Checkpoint, population: int, channels: Iterable[str] = ()) -> RunState:
        arrays, values = saved

        def part(prefix: str) -> dict[str, NDArray[Any]]:
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

        costs = np.zeros((population, len(COSTS)))
        costs[arrays["costs.clients"]] = arrays["costs.totals"]
        return RunState(
            round=values["round"],
            weights=Weights(arrays["vector"], arrays["buffers"]),
            server=part("server."),
            aggregator=part("aggregator."),
            buffers=part("buffers."),
            method=part("method."),
            timing=part("timing."),
            watch=part("watch."),
            privacy=part("privacy."),
            sides={channel: part(f"sides.{channel}/") for channel in channels},
            costs=costs,
            simulated_seconds=values["simulated_seconds"],
            stopped=values["stopped"],
            sent=values["sent"],
            barren=values["barren"],
            spent=arrays.get("spent", np.empty(0, np.int64)),
        )

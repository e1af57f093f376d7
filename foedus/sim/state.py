"""The state of a run between two rounds, and its way into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.values import State
from foedus.record import Checkpoint
from foedus.tree import Vector

COSTS = ("rounds", "bytes_up", "bytes_down", "compute_seconds", "energy_joules")


@dataclass
class RunState:
    """Everything that the next round depends on, and the totals.

    ``costs`` has one row per client that ever took part: position → float64 [5], see ``COSTS``.
    """

    round: int
    weights: Weights
    server: State
    aggregator: State
    buffers: State
    kept: dict[int, Vector] = field(default_factory=dict)
    costs: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    simulated_seconds: float = 0.0
    stopped: str | None = None

    def checkpoint(self, identity: str, executor: str) -> Checkpoint:
        arrays: dict[str, NDArray[Any]] = {"vector": self.weights.vector, "buffers": self.weights.buffers}
        for part in ("server", "aggregator", "buffers"):
            arrays |= {f"{part}.{name}": array for name, array in getattr(self, part).items()}
        arrays |= {f"kept.{client}": vector for client, vector in self.kept.items()}
        if self.costs:
            arrays["costs.clients"] = np.array(list(self.costs), np.int64)
            arrays["costs.totals"] = np.stack(list(self.costs.values()))
        return Checkpoint(
            arrays,
            {
                "round": self.round, "simulated_seconds": self.simulated_seconds, "stopped": self.stopped,
                "identity": identity, "executor": executor,
            },
        )  # fmt: skip

    @staticmethod
    def restored(saved: Checkpoint) -> RunState:
        arrays, values = saved

        def part(prefix: str) -> dict[str, NDArray[Any]]:
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

        costs = part("costs.")
        return RunState(
            round=values["round"],
            weights=Weights(arrays["vector"], arrays["buffers"]),
            server=part("server."),
            aggregator=part("aggregator."),
            buffers=part("buffers."),
            kept={int(client): vector for client, vector in part("kept.").items()},
            costs=dict(zip(costs["clients"].tolist(), costs["totals"], strict=True)) if costs else {},
            simulated_seconds=values["simulated_seconds"],
            stopped=values["stopped"],
        )

"""Every node's own model, evaluated during local training: the data of the talk's first figure."""

from __future__ import annotations

from pathlib import Path

from foedus.backends import Trainer, Weights
from foedus.errors import ConfigurationError
from foedus.record.files import json_line, storage
from foedus.sim.debug import DebugSession
from foedus.sim.settings import LocalCurves
from foedus.sim.work import Job, Orders, Outcome

LOCAL = "local.jsonl"


def attach(asked: LocalCurves, job: Job, trainer: Trainer, folder: Path) -> DebugSession:
    """A debug session that writes ``local.jsonl``: round, client, local step, loss and metrics.

    Rounds already in the file from before an interruption are written again; readers take the last line of a
    (round, client, step).
    """
    examples = asked.examples or job.clients.central_test
    if examples is None:
        raise ConfigurationError("LocalCurves needs examples to evaluate on: give them, or a central test set")
    session = _Observed(job, trainer)

    def observe(client: int, step: int, weights: Weights) -> None:
        if step % asked.every:
            return
        line = {"round": session.round, "client": job.clients.ids[client], "step": step}
        with storage(folder / LOCAL), open(folder / LOCAL, "ab") as file:
            file.write(json_line(line | observer.evaluate(weights, examples)))

    observer = session.observer
    session.observe = observe
    return session


class _Observed(DebugSession):
    """Knows the round, and has a second model to evaluate with while the first one trains."""

    def __init__(self, job: Job, trainer: Trainer) -> None:
        from foedus.backends import open_trainer

        super().__init__(job, trainer)
        self.observer = open_trainer(job.task, seed=job.seed, device=job.device)
        self.round = 0

    def run(self, orders: Orders) -> Outcome:
        self.round = orders.round
        return super().run(orders)

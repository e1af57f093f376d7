"""Every node's own model, evaluated during local training: the data of the talk's first figure."""

from __future__ import annotations

from typing import Any

from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.examples import Examples
from foedus.errors import ConfigurationError
from foedus.record import RunFolder
from foedus.record.folder import LOCAL
from foedus.rounds.debug import DebugSession
from foedus.rounds.work import Job, Orders, Outcome
from foedus.sim.settings import LocalCurves


def attach(asked: LocalCurves, job: Job, trainer: Trainer, folder: RunFolder) -> DebugSession:
    """A debug session that writes ``local.jsonl``: round, client, local step, loss and metrics.

    Raises:
        ConfigurationError: there is nothing to evaluate on.
    """
    examples = asked.examples or job.clients.central_test
    if examples is None:
        raise ConfigurationError(
            "LocalCurves needs examples to evaluate on: LocalCurves(examples=...), or clients.with_test((x, y))"
        )
    return _Observed(job, trainer, _Observer(asked.every, examples, job, folder))


class _Observed(DebugSession):
    """Tells the observer where one round, and one client, ends."""

    def __init__(self, job: Job, trainer: Trainer, observer: _Observer) -> None:
        super().__init__(job, trainer)
        self._observer = observer
        self.observe = observer.observe

    def run(self, orders: Orders) -> Outcome:
        self._observer.begin(orders.round)
        outcome = super().run(orders)
        self._observer.end()
        return outcome


class _Observer:
    """Evaluates with a model of its own, while the session's trains."""

    def __init__(self, every: int, examples: Examples, job: Job, folder: RunFolder) -> None:
        self._every, self._examples, self._ids, self._folder = every, examples, job.clients.ids, folder
        self._trainer = open_trainer(job.task, seed=job.seed, device=job.device)
        self._round = 0
        self._start: tuple[Weights, dict[str, float]] | None = None
        self._latest: tuple[int, int, Weights] | None = None  # not yet written

    def begin(self, round: int) -> None:
        self._round, self._start, self._latest = round, None, None

    def observe(self, client: int, step: int, weights: Weights) -> None:
        if step == 0:
            self.end()
            self._write(client, step, self._received(weights))
        elif step % self._every == 0:
            self._write(client, step, self._trainer.evaluate(weights, self._examples))
            self._latest = None
        else:
            self._latest = client, step, weights

    def end(self) -> None:
        """A client's last step is written whatever ``every`` says."""
        if self._latest is not None:
            client, step, weights = self._latest
            self._write(client, step, self._trainer.evaluate(weights, self._examples))
            self._latest = None

    def _received(self, weights: Weights) -> dict[str, float]:
        """The received model's figures: the same for all clients, unless they keep buffers of their own."""
        if self._start is None or any(a is not b for a, b in zip(self._start[0], weights, strict=True)):
            self._start = weights, self._trainer.evaluate(weights, self._examples)
        return self._start[1]

    def _write(self, client: int, step: int, figures: dict[str, float]) -> None:
        line: dict[str, Any] = {"round": self._round, "client": self._ids[client], "step": step}
        self._folder.append(LOCAL, line | figures)

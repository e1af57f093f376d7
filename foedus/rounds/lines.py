"""A round's line in ``metrics.jsonl``: the same figures, by the same names, wherever the round took place.

Not here: figures of evaluation (``evaluate.py``), files (``foedus.record``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import ClientId
from foedus.rounds.spending import Spending
from foedus.rounds.state import RunState
from foedus.rounds.work import Job, Outcome, Refusal


def round_line(
    job: Job, state: RunState, outcome: Outcome, costs: NDArray[np.float64], *, spending: Spending | None = None,
    told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What is written about a round that has been committed.

    Args:
        job: of the run.
        state: after the round.
        outcome: what the clients brought.
        costs: float64 [A, 5], of all that were asked, see :data:`foedus.rounds.state.COSTS`.
        spending: where there is a budget.
        told: further figures.
    """
    line: dict[str, Any] = {
        "round": state.round,
        "cohort": len(costs),
        "trained": len(outcome.clients),
        "examples": None if 0 in outcome.examples else sum(outcome.examples),
        "steps": int(np.sum(outcome.steps)),
        "train_loss": train_loss(outcome),
        "bytes_up": int(costs[:, 1].sum()),
        "bytes_down": int(costs[:, 2].sum()),
        **(told or {}),
    }
    if job.algorithm.method is not None:
        line["senders"] = outcome.senders
        line |= {"report": _mean_report(outcome)} if outcome.reports else {}
    if spending is not None:
        line["privacy"] = spending.line(state)
    if outcome.spent:
        line["spent"] = [{"client": job.clients.ids[c], "reason": told} for c, told in sorted(outcome.spent.items())]
    if outcome.refused:
        line["refused"] = [_refused(r, job.clients.ids) for r in outcome.refused]
    return line


def train_loss(outcome: Outcome) -> float | None:
    """The mean loss of the updates that were let in, weighted by examples; None if none is known."""
    refused = outcome.out
    rows = zip(outcome.clients, outcome.examples, outcome.losses, strict=True)
    known = [(n, loss) for client, n, loss in rows if client not in refused and math.isfinite(loss)]
    total = sum(n for n, _ in known)
    return sum(n * loss for n, loss in known) / total if total else None


def _refused(refusal: Refusal, ids: Sequence[ClientId]) -> dict[str, Any]:
    """A refusal in the record; edge aggregators have numbers after the clients'."""
    edge = refusal.client - len(ids)
    who: dict[str, Any] = {"edge": edge} if edge >= 0 else {"client": ids[refusal.client]}
    return who | {"reason": refusal.reason}


def _mean_report(outcome: Outcome) -> dict[str, float]:
    """The mean over clients of what a method reports of each."""
    names = sorted({name for report in outcome.reports.values() for name in report})
    rows = [outcome.reports[client] for client in sorted(outcome.reports)]
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def described(job: Job, *, cohort: str, rounds: int, layouts: tuple[int, int], backend: str) -> dict[str, Any]:
    """What ``run.json`` says about a run, wherever it takes place.

    Args:
        job: of the run.
        cohort: who is asked, in words.
        rounds: how many there are to be.
        layouts: how many parameters and buffers the model has.
        backend: what the model is computed with.
    """
    metrics = job.task.metrics
    return {
        "algorithm": job.algorithm.label,
        "cohort": cohort,
        "rounds": rounds,
        "seed": job.seed,
        "clients": len(job.clients),
        "parameters": layouts[0],
        "buffers": layouts[1],
        "backend": backend,
        "metrics": [m.name for m in metrics],
        "better": {"loss": "min"} | {m.name: "min" if m.better is min else "max" for m in metrics},
    }

"""Evaluation of the global model: centrally, and client by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights
from foedus.core.checks import check_whole
from foedus.core.examples import Examples
from foedus.core.population import ClientId
from foedus.core.task import Metric, Task
from foedus.errors import ConfigurationError, FoedusError, TrainingError
from foedus.rounds.state import RunState
from foedus.rounds.work import Job, held_out
from foedus.tree import Vector

WORST = 0.1  # the worst decile


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, and when to stop.

    Attributes:
        every: evaluate after each so many rounds (and after the last); 0 for never.
        clients: also evaluate on every client's own test examples (where no client has any: validation, else
            training examples),
            report mean, spread and worst decile, and keep every client's figures (``run.clients``, in the run
            folder ``clients.jsonl``).
        stop_at: stop as soon as a central figure is reached, e.g. ``{"accuracy": 0.97}``.

    Example:
        >>> Evaluation(every=5, clients=True, stop_at={"accuracy": 0.97}).every
        5
    """

    every: int = 1
    clients: bool = False
    stop_at: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_whole("Evaluation(every=...)", self.every, least=0, also=" rounds (0 for never)")
        if self.stop_at is not None and not isinstance(self.stop_at, Mapping):
            raise ConfigurationError(
                f"stop_at names a figure and its value, e.g. stop_at={{'accuracy': 0.97}}; not {self.stop_at!r}"
            )
        for name, value in (self.stop_at or {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise ConfigurationError(f"stop_at[{name!r}] must be a number, not {value!r}")
            if np.isnan(value):
                raise ConfigurationError(f"stop_at[{name!r}] is nan, which no figure ever reaches; write a number")
        if self.stop_at and not self.every:
            raise ConfigurationError("stop_at needs evaluation: write every=1, or another number of rounds")


class Evaluated(NamedTuple):
    """What an evaluation found.

    Attributes:
        figures: ``{"central": {...}, "clients": {...}}``, as far as there is data for it: for ``metrics.jsonl``.
        clients: client's id → number of examples and figures, for ``clients.jsonl``.
    """

    figures: dict[str, Any]
    clients: dict[ClientId, ClientFigures]


class ClientFigures(NamedTuple):
    """The loss and metrics of the global model on one client's examples, and how many these are; and those of the
    client's own model, if the algorithm gives it one."""

    examples: int
    figures: dict[str, float]
    personal: dict[str, float] | None = None


# A client's position → the buffers that the global model has there, and its own model, if there is one.
Models = Callable[[int], tuple[Vector, Weights | None]]


def evaluate(job: Job, trainer: Trainer, state: RunState, own: Models | None) -> Evaluated:
    """The global model on the central test set, if there is one, and on every client's own data, if asked.

    Args:
        job, trainer: of the run.
        state: after a round.
        own: gives each client's own models; ``None`` leaves clients out.
    """
    figures: dict[str, Any] = {}
    central = job.clients.at(state.round).central_test
    if central is not None:
        figures["central"] = _of(trainer, state.weights, central, "the central test set")
    if own is None:
        return Evaluated(figures, {})
    found = _clients(job, trainer, state, own)
    figures["clients"] = spread([each.figures for each in found.values()], job.task.metrics)
    if personal := [each.personal for each in found.values() if each.personal is not None]:
        figures["personal"] = spread(personal, job.task.metrics)
    return Evaluated(figures, found)


def _clients(job: Job, trainer: Trainer, state: RunState, own: Models) -> dict[ClientId, ClientFigures]:
    """Every client that has examples, in the order of the population."""
    found = {}
    clients = job.clients.at(state.round)
    for position, client in enumerate(clients.ids):
        examples = held_out(clients, position)
        if len(examples):
            buffers, personal = own(position)
            whose = f"the data of client {client!r}"
            figures = _of(trainer, Weights(state.weights.vector, buffers), examples, whose)
            mine = None if personal is None else _of(trainer, personal, examples, whose)
            found[client] = ClientFigures(len(examples), figures, mine)
    return found


def _of(trainer: Trainer, weights: Weights, examples: Examples, whose: str) -> dict[str, float]:
    try:
        return trainer.evaluate(weights, examples)
    except FoedusError:
        raise
    except Exception as error:
        raise TrainingError(
            f"evaluation on {whose} failed: {type(error).__name__}: {error}; the examples are {examples!r}",
            batch=(list(examples.inputs), examples.targets),
        ) from error


def checked(task: Task) -> Task:
    """The same task, whose metrics refuse to give another number of values than they should."""
    return replace(task, metrics=tuple(metric._replace(value=_checked(metric)) for metric in task.metrics))


def _checked(metric: Metric) -> Callable[..., Any]:
    def value(output: NDArray[Any], target: NDArray[Any]) -> Any:
        found = metric.value(output, target)
        shape = np.shape(found)
        size = int(np.prod(shape))
        sound = size == 1 if metric.whole else shape[:1] == (len(target),) or (shape and size == target.size)
        if sound:
            return found
        wanted = (
            "one number for the whole set"
            if metric.whole
            else f"one value for each of the {len(target)} examples (if it is no mean over them: whole=True)"
        )
        raise ConfigurationError(
            f"the metric {metric.name!r} must give {wanted}, and gave "
            f"{f'an array {list(shape)}' if shape else 'one number'}"
        )

    return value


def spread(rows: Sequence[Mapping[str, float]], metrics: Sequence[Metric]) -> dict[str, Any]:
    """Mean, spread (standard deviation) and worst decile over clients, each client counting the same.

    The worst decile is the mean over the worst tenth of the clients, at least one. A client for which a metric
    is not defined (NaN: AUROC of one class) is left out of that metric and counted in ``undefined``.
    """
    better = {m.name: m.better for m in metrics}
    found: dict[str, Any] = {}
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows], np.float64)
        known = np.sort(values[~np.isnan(values)])
        if better.get(name, min) is min:
            known = known[::-1]
        worst = known[: max(1, int(np.ceil(WORST * len(known))))]
        figure: dict[str, Any] = {"undefined": int(np.isnan(values).sum())} if len(known) < len(values) else {}
        if len(known):
            with np.errstate(invalid="ignore"):  # a client's loss may be infinite
                of = {"mean": known.mean(), "spread": known.std(), "worst_decile": worst.mean()}
            figure |= {what: float(value) for what, value in of.items()}
        found[name] = figure
    return found


def reached(central: Mapping[str, float], targets: Mapping[str, float] | None, metrics: Sequence[Metric]) -> str | None:
    """Why a run may stop; ``None`` if it goes on."""
    better = {"loss": min} | {m.name: m.better for m in metrics}
    for name, target in (targets or {}).items():
        value = central.get(name)
        if value is not None and ((value >= target) if better[name] is max else (value <= target)):
            return f"{name} reached {value:.6g}, wanted {target:g}"
    return None


def check_targets(targets: Mapping[str, float] | None, metrics: Sequence[Metric], *, central: bool) -> None:
    """Refuse ``stop_at`` figures that will never be there.

    Raises:
        ConfigurationError: no such metric, or no test set.
    """
    known = ["loss", *(m.name for m in metrics)] if central else []
    if unknown := [name for name in targets or () if name not in known]:
        gives = ", ".join(known) or "nothing: there is no test set (clients.with_test((x, y)) adds one)"
        raise ConfigurationError(f"stop_at names {unknown[0]!r}; central evaluation gives {gives}")

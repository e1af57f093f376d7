"""A sweep: the same federation with every combination of some values, in one call.

Every combination has a run folder of its own inside the sweep's, named after its values; an interrupted sweep
goes on where it stopped, and a sweep over more values takes the runs that are there already.

Not here: cleverer searches. Give the combinations to Optuna or the like, and let it call ``simulate``.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foedus.errors import ConfigurationError, FoedusError, NothingToAggregate
from foedus.record import Record, files
from foedus.record.folder import new_folder, read
from foedus.report.curves import better, curve, plot_runs, rounds_to
from foedus.report.tables import plain, table
from foedus.sim.federation import Federation, run_federation
from foedus.sim.progress import steps

RESULTS = "sweep.jsonl"


class Result(NamedTuple):
    """One combination of values.

    Attributes:
        values: name → value, as in the grid.
        record: of its run.
        final: the metric after the last round; NaN if training diverged.
        best: the best value so far at any round.
        rounds: rounds to the target; ``None`` if there is none, or it was not reached.
    """

    values: dict[str, Any]
    record: Record
    final: float
    best: float
    rounds: float | None

    @property
    def name(self) -> str:
        """As written on figures, e.g. ``"lr=0.1, epochs=5"``."""
        return _name(self.values)

    def __repr__(self) -> str:
        return f"Result({self.name}: {_value(self.final)}, best {_value(self.best)}, in {self.record.folder})"


class Sweep(NamedTuple):
    """The results of a sweep, best first.

    Attributes:
        folder: where everything is.
        metric: what they are sorted by.
        target: the value of it that was wanted, if any: then they are sorted by the rounds it took.
        results: one per combination.

    Example:
        >>> found = sweep(variant, {"lr": [0.01, 0.1]})  # doctest: +SKIP
        >>> found.best.values  # doctest: +SKIP
        {'lr': 0.1}
    """

    folder: Path
    metric: str
    target: float | None
    results: list[Result]

    @property
    def best(self) -> Result:
        """The best combination.

        Raises:
            ConfigurationError: every one of them diverged.
        """
        if math.isnan(self.results[0].final):
            raise ConfigurationError("every combination diverged; try smaller learning rates")
        return self.results[0]

    def table(self) -> Any:
        """A rich table, best first."""
        return table([self._row(r) for r in self.results], best=None if math.isnan(self.results[0].final) else 0)

    def plot(self, path: str | Path | None = None) -> Any:
        """The metric over rounds, of every combination; saved as ``figures/sweep.png`` in the folder."""
        runs = {r.name: r.record for r in self.results if len(curve(r.record.metrics, "central", self.metric).rounds)}
        return plot_runs(runs, self.metric, path or self.folder / "figures" / "sweep.png")

    def _row(self, result: Result) -> dict[str, Any]:
        row = {name: _label(value) for name, value in result.values.items()}
        diverged = math.isnan(result.final)
        row |= {self.metric: "diverged" if diverged else f"{result.final:.4g}", "best": f"{result.best:.4g}"}
        if self.target is not None:
            row[f"rounds to {self.target:g}"] = "never" if result.rounds is None else f"{result.rounds:.1f}"
        return row

    def __repr__(self) -> str:
        return f"Sweep({len(self.results)} runs, best: {self.results[0].name}, in {self.folder})"


def sweep(
    variant: Callable[..., Federation],
    grid: Mapping[str, Iterable[Any]],
    *,
    metric: str | None = None,
    target: float | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Run a federation for every combination of values.

    Args:
        variant: values → :class:`Federation`; called with one value of each name of the grid.
        grid: name → values, e.g. ``{"lr": [0.01, 0.1, 1.0], "epochs": [1, 5]}``. A value may be anything: a
            number, an algorithm, a partition; what has a ``label`` is shown by it.
        metric: the central figure to sort by; by default the task's first metric, or the loss.
        target: sort by the rounds until the metric reached this value first.
        folder: the sweep's folder; by default a new one under ``runs/``. Resumed if it has been used.
        progress: show a bar, and a line per run.

    Returns:
        The results, best first: ``.best.values``, ``.table()``, ``.plot()``. A run that diverges comes last.

    Raises:
        ConfigurationError: the grid is empty, ``variant`` gives no Federation, or nothing was evaluated.

    Example:
        >>> def variant(lr, epochs):
        ...     algorithm = fd.fedavg(fd.local_sgd(lr=lr, epochs=epochs))
        ...     return fd.Federation(task=task, algorithm=algorithm, clients=clients, rounds=20)
        >>> sweep(variant, {"lr": [0.01, 0.1], "epochs": [1, 5]}).table()  # doctest: +SKIP
    """
    combinations = _combinations(grid)
    place = Path(folder) if folder else new_folder("sweep-")
    records: list[tuple[dict[str, Any], Record]] = []
    with steps(progress, len(combinations), "runs") as done:
        for number, values in enumerate(combinations, 1):
            record = _run(variant, values, place)
            records.append((values, record))
            metric = metric or next(iter(record.configuration["metrics"]), "loss")
            _check_evaluated(record, metric)
            done(f"{number}/{len(combinations)} {_told(_result(values, record, metric, target), metric)}")
    assert metric is not None
    found = Sweep(place, metric, target, _sorted([_result(*r, metric, target) for r in records], metric))
    lines = [{**_shown(r.values), metric: r.final, "best": r.best, "rounds": r.rounds} for r in found.results]
    files.replace(place / RESULTS, b"".join(files.json_line(line) for line in lines))
    files.replace(place / "sweep.txt", (plain(found.table()) + "\n").encode())
    return found


def _run(variant: Callable[..., Federation], values: dict[str, Any], place: Path) -> Record:
    try:
        inspect.signature(variant).bind(**values)
    except TypeError as error:
        name = getattr(variant, "__name__", "the function")
        raise ConfigurationError(
            f"sweep() calls {name}({', '.join(f'{v}=...' for v in values)}), with the names of the grid: {error}"
        ) from error
    try:
        federation = variant(**values)
    except FoedusError:
        raise
    except Exception as error:
        name = getattr(variant, "__name__", "the function")
        raise ConfigurationError(
            f"sweep() called {name}({_name(values)}), which failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(federation, Federation):
        raise ConfigurationError(
            f"sweep() calls {getattr(variant, '__name__', 'its function')}({', '.join(values)}), which must return a "
            f"foedus.Federation and returned something of type {type(federation).__name__}"
        )
    own = place / _folder_name(values)
    settings = replace(federation.settings, folder=own, progress=False)
    try:
        return run_federation(replace(federation, settings=settings)).record
    except NothingToAggregate:  # diverged: a result as well
        return read(own)


def _check_evaluated(record: Record, metric: str) -> None:
    finished = record.configuration.get("status") == "finished"  # if not, it diverged, perhaps before the first time
    if finished and record.metrics and not any("central" in line for line in record.metrics):
        raise ConfigurationError(
            "sweep() sorts by a central figure, and nothing was evaluated centrally: give the clients a test set, "
            "clients.with_test((x, y)), and let Evaluation(every=...) be a number of rounds"
        )
    if record.final and metric not in record.final:
        there = ", ".join(record.final)
        raise ConfigurationError(f"sweep(metric={metric!r}): there is no such figure; there is {there}")


def _result(values: dict[str, Any], record: Record, metric: str, target: float | None) -> Result:
    choose, seen = better(record, metric), curve(record.metrics, "central", metric).values
    diverged = record.configuration.get("status") != "finished" or not len(seen)
    last = record.final.get(metric)
    rounds = None
    if target is not None and len(seen):
        rounds = rounds_to(record.metrics, metric, target, better=choose)
    final = float("nan") if diverged or last is None else float(last)
    return Result(values, record, final, float(choose(seen)) if len(seen) else float("nan"), rounds)


def _sorted(results: list[Result], metric: str) -> list[Result]:
    """Fewest rounds to the target, then the best final value; what diverged last."""
    sign = 1 if better(results[0].record, metric) is min else -1

    def rank(result: Result) -> tuple[bool, float, float]:
        diverged = math.isnan(result.final)
        rounds = math.inf if result.rounds is None or diverged else result.rounds
        return diverged, rounds, 0.0 if diverged else sign * result.final

    return sorted(results, key=rank)


def _combinations(grid: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination, in order; all must be told apart by how they are shown."""
    lists = {name: _values(name, values) for name, values in grid.items()}
    if not lists:
        raise ConfigurationError("the grid is empty; write e.g. {'lr': [0.01, 0.1, 1.0]}")
    found = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    folders: dict[str, dict[str, Any]] = {}
    for values in found:
        if folders.setdefault(_folder_name(values), values) is not values:
            raise ConfigurationError(
                f"two combinations of the grid are both shown as {_name(values)}. Let the grid hold names instead, "
                "and look them up in the function: lambda schedule: ... SCHEDULES[schedule]"
            )
    return found


def _values(name: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (listed := list(values)):
        raise ConfigurationError(f"the grid's {name!r} must be a list of at least one value, not {values!r}")
    return [v.item() if isinstance(v, np.generic) else v for v in listed]


def _name(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_label(value)}" for name, value in values.items())


def _folder_name(values: Mapping[str, Any]) -> str:
    """A name for the run folder that the values decide, readable, and safe on every file system."""
    told = _name(values).replace(", ", ",")
    safe = re.sub(r"[^\w.,=+-]+", "_", told)
    if safe == told and len(told) <= 80:
        return told
    return f"{safe[:70]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _label(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(getattr(value, "label", None) or getattr(value, "__name__", None) or value)


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    plain_kinds = int | float | str | bool | None
    return {name: value if isinstance(value, plain_kinds) else _label(value) for name, value in values.items()}


def _value(figure: float) -> str:
    return "diverged" if math.isnan(figure) else f"{figure:.4g}"


def _told(result: Result, metric: str) -> str:
    value = "diverged" if math.isnan(result.final) else f"{metric} {result.final:.4g}"
    return f"{result.name}: {value}"

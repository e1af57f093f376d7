"""Federated beside centralised beside local-only training: the table, the figure and one sentence.

Not here: the runs (``foedus.sim.compare``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.record import Record
from foedus.report.curves import Curve, better, curve, open_canvas
from foedus.report.tables import bytes_shown, table

if TYPE_CHECKING:
    from rich.table import Table

    from foedus.report.canvas import Picture


class Arm(NamedTuple):
    """One way to train: a name and its runs, one or (for clients alone) several."""

    name: str
    records: Sequence[Record]

    def final(self, metric: str) -> NDArray[np.float64]:
        """The last evaluated value of each run, [run]; NaN where there is none, or where the run diverged."""
        curves = [curve(record.metrics, "central", metric).values for record in self.records]
        ended = [record.configuration.get("status", "finished") == "finished" for record in self.records]
        return np.array([c[-1] if len(c) and e else np.nan for c, e in zip(curves, ended, strict=True)])

    def best(self, metric: str) -> NDArray[np.float64]:
        """The best value of each run at any time, [run]."""
        choose = better(self.records[0], metric)
        curves = [curve(record.metrics, "central", metric).values for record in self.records]
        return np.array([choose(c) if len(c) else np.nan for c in curves])


def comparison_table(arms: Sequence[Arm]) -> Table:
    """One column per way to train, one row per figure; for several runs the mean, and the best and the worst."""
    columns: dict[str, dict[str, str]] = {}
    for arm in arms:
        columns |= _columns(arm, _metrics(arms))
    figures = dict.fromkeys(name for column in columns.values() for name in column)
    rows: list[dict[str, Any]] = [
        {"": name} | {told: column.get(name) for told, column in columns.items()} for name in figures
    ]
    return table(rows, notes=verdict(arms))


def verdict(arms: Sequence[Arm]) -> str:
    """What the comparison says, in one sentence.

    Example:
        >>> line = lambda a: Record(Path("r"), {}, [{"round": 1, "central": {"accuracy": a}}], [])
        >>> arms = [("federated", 0.9), ("centralised", 1.0), ("alone", 0.5)]
        >>> verdict([Arm(name, [line(accuracy)]) for name, accuracy in arms]).partition("; ")[2]
        'all data in one place: 1. That is 80 % of the way.'
    """
    metric = next((name for name in _metrics(arms) if name != "loss"), "loss")
    known = {arm.name: (v := arm.final(metric))[~np.isnan(v)] for arm in arms}
    if lost := [name for name, values in known.items() if not len(values)]:
        return " ".join(_why_lost(arm) for arm in arms if arm.name in lost)
    federated, centralised, alone = (float(values.mean()) for values in known.values())
    told = (
        f"Federation takes {metric} from {alone:.4g} (a client alone, on average) to {federated:.4g}; "
        f"all data in one place: {centralised:.4g}."
    )
    sign = -1 if better(arms[0].records[0], metric) is min else 1
    if sign * (centralised - alone) > 0:
        share = 100 * (federated - alone) / (centralised - alone)
        if share < 0:
            return f"{told} Federation does worse than training alone."
        told += f" That is {f'{share:.0f} %' if share < 100 else 'all'} of the way."
    elif sign * (federated - alone) < 0:
        told += " Federation does worse than training alone."
    return told


def _why_lost(arm: Arm) -> str:
    """Why no run of an arm came to its end, in the words of the error that ended it."""
    told = next((str(e) for record in arm.records if (e := record.configuration.get("error"))), None)
    if told is None:
        return f"Training diverged: {arm.name}. Try a smaller learning rate, or clip_norm in local_sgd()."
    return f"Training ended early: {arm.name}, {told}{'' if told.endswith('.') else '.'}"


def plot_comparison(arms: Sequence[Arm], path: Path | None = None) -> Picture:
    """Every metric over rounds; where there are several runs their mean, and the range between best and worst.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    canvas = open_canvas()
    names = _metrics(arms)
    figure: Picture
    figure, axes = canvas.picture(len(names), size=(5.6 * len(names), 4.0))
    for each, name in zip(axes, names, strict=True):
        _panel(each, arms, name)
    if path:
        canvas.save(figure, path)
    return figure


def _panel(axes: Any, arms: Sequence[Arm], metric: str) -> None:
    canvas = open_canvas()
    colours = {"federated": canvas.GREEN, "centralised": canvas.BLACK, "alone": canvas.ORANGE}
    names, values = [], []
    for arm in arms:
        colour = colours.get(arm.name, canvas.BLUE)
        runs = [c for record in arm.records if len((c := curve(record.metrics, "central", metric)).rounds)]
        if not runs:  # diverged before it was ever evaluated
            continue
        mean = _mean(runs)
        if len(runs) > 1:
            _range(axes, runs, colour)
        axes.plot(*mean, color=colour, linewidth=2.0)
        values.append(mean.values)
        text = arm.name if len(runs) == 1 else f"{arm.name}, mean of {len(runs)}"
        names.append(canvas.Name(text, mean.rounds[-1], mean.values[-1], colour))
    axes.set_xlim(0, max((name.x for name in names), default=1))
    canvas.log_if_wide(axes, np.concatenate([[], *values]))
    canvas.caption(axes, f"Test {metric}", x="round")
    canvas.write_names(axes, names)


def _range(axes: Any, runs: Sequence[Curve], colour: str) -> None:
    shared = _shared(runs)
    values = np.stack([c.values[np.isin(c.rounds, shared)] for c in runs])  # [run, round]
    axes.fill_between(shared, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    for each in values:
        axes.plot(shared, each, color=colour, linewidth=0.6, alpha=0.45)


def _mean(runs: Sequence[Curve]) -> Curve:
    shared = _shared(runs)
    return Curve(shared, np.mean([c.values[np.isin(c.rounds, shared)] for c in runs], axis=0))


def _shared(runs: Sequence[Curve]) -> NDArray[np.float64]:
    """The rounds in which all runs were evaluated, in order."""
    shared = runs[0].rounds
    for other in runs[1:]:
        shared = np.intersect1d(shared, other.rounds)
    return shared


def _metrics(arms: Sequence[Arm]) -> list[str]:
    """The figures that were evaluated, in order; a run that diverged at once has none."""
    lines = (line["central"] for arm in arms for run in arm.records for line in run.metrics if "central" in line)
    return list(next(lines, {}))


def _columns(arm: Arm, metrics: Sequence[str]) -> dict[str, dict[str, str]]:
    """The table's columns about one way to train: heading → figure → text."""
    column = {metric: _with_spread(arm.final(metric)) for metric in metrics}
    column |= {f"best {metric}": _shown(arm.best(metric), np.mean) for metric in metrics if metric != "loss"}
    lines = arm.records[0].metrics
    column["local steps"] = f"{sum(line['steps'] for line in lines):,}"
    if arm.name == "federated":
        column["traffic"] = bytes_shown(sum(line["bytes_up"] + line["bytes_down"] for line in lines))
    if len(arm.records) == 1:
        return {arm.name: column}
    ways = {metric: better(arm.records[0], metric) for metric in metrics}
    return {
        f"{arm.name}, mean of {len(arm.records)}": column,
        f"best of {len(arm.records)}": {
            m: _shown(arm.final(m), np.min if way is min else np.max) for m, way in ways.items()
        },
        f"worst of {len(arm.records)}": {
            m: _shown(arm.final(m), np.max if way is min else np.min) for m, way in ways.items()
        },
    }


def _shown(values: NDArray[np.float64], choose: Callable[[NDArray[np.float64]], Any]) -> str:
    """One number for those of several runs that did not diverge."""
    known = values[~np.isnan(values)]
    return f"{choose(known):.4g}" if len(known) else "diverged"


def _with_spread(values: NDArray[np.float64]) -> str:
    known = values[~np.isnan(values)]
    spread = f" ± {known.std():.2g}" if len(known) > 1 else ""
    return _shown(values, np.mean) + spread

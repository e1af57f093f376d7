"""Curves over rounds: what a run learned and what it cost, several runs in one picture, and rounds to a target.

    plot_run                     one run: loss, every metric, bytes
    plot_runs                    one metric of several runs
    plot_accuracy_by_partition   the talk's second figure: one metric for ever more skewed data
    rounds_to                    when a target was reached

Everything is read from the record, so a run of last year, or one still going on, is drawn the same way.

Not here: what happens inside a round (``local.py``), how figures look (``canvas.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError, MissingExtra
from foedus.record import Record

if TYPE_CHECKING:
    from foedus.report.canvas import Picture

LOWER_IS_BETTER = ("loss", "rmse", "mae")  # where a record does not say


class Curve(NamedTuple):
    """A figure over the rounds in which it was evaluated: rounds [n], values [n]."""

    rounds: NDArray[np.float64]
    values: NDArray[np.float64]


def curve(metrics: Sequence[Mapping[str, Any]], *path: str) -> Curve:
    """The figure at a path of keys in the lines of ``metrics.jsonl``, where it is a number.

    Example:
        >>> curve([{"round": 1}, {"round": 2, "central": {"loss": 0.5}}], "central", "loss").values.tolist()
        [0.5]
    """
    found = [(line["round"], _at(line, path)) for line in metrics]
    known = [(r, v) for r, v in found if isinstance(v, int | float)]
    return Curve(*np.array(known, np.float64).reshape(-1, 2).T)


def rounds_to(
    metrics: Sequence[Mapping[str, Any]],
    metric: str,
    target: float,
    *,
    better: Callable[..., Any] | None = None,
) -> float | None:
    """Rounds until a central figure reached a target; ``None`` if it never did.

    The curve is made monotone by its best value so far, and interpolated linearly between the rounds that were
    evaluated (McMahan et al. 2017, section 3). A target reached at the first evaluation is reported there.

    Args:
        metrics: the lines of ``metrics.jsonl``, as in ``run.metrics``.
        metric: e.g. ``"accuracy"``.
        target: the value wanted.
        better: ``max`` or ``min``; by default ``min`` for loss, rmse and mae, and ``max`` for all else.

    Raises:
        ConfigurationError: the metric was never evaluated.

    Example:
        >>> lines = [{"round": r, "central": {"accuracy": a}} for r, a in ((1, 0.5), (2, 0.9), (3, 0.7))]
        >>> rounds_to(lines, "accuracy", 0.8)
        1.75
    """
    sign = -1.0 if (better or _usually_better(metric)) is min else 1.0
    rounds, values = curve(metrics, "central", metric)
    if not len(rounds):
        there = ", ".join(_names(metrics)) or "nothing (no test set, or no evaluation)"
        raise ConfigurationError(f"{metric!r} was never evaluated in this run; there is: {there}")
    best, goal = np.maximum.accumulate(sign * values), sign * target
    if best[-1] < goal:
        return None
    k = int(np.argmax(best >= goal))
    if k == 0:
        return float(rounds[0])
    share = (goal - best[k - 1]) / (best[k] - best[k - 1])
    return float(rounds[k - 1] + share * (rounds[k] - rounds[k - 1]))


def plot_run(record: Record, path: str | Path | None = None) -> Picture:
    """Loss, every metric and the bytes sent, over rounds.

    Args:
        record: a run's record, finished or not: ``run.record``.
        path: where to save the figure; by default ``figures/curves.png`` in the run folder.

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigurationError: no round is done yet.
    """
    if not record.metrics:
        raise ConfigurationError(f"there is nothing to draw yet: {record.folder} has no finished round")
    canvas = open_canvas()
    figure: Picture
    names = [n for n in _names(record.metrics) if n != "loss"]
    figure, axes = canvas.picture(len(names) + 2)
    for each in axes:  # before anything is drawn: the names of the curves are put where the axis ends
        each.set_xlim(0, max(1, record.metrics[-1]["round"]))
    _draw_loss(axes[0], record.metrics, canvas)
    for each, name in zip(axes[1:], names, strict=False):
        _draw_metric(each, record.metrics, name, canvas)
    _draw_bytes(axes[-1], record.metrics, canvas)
    canvas.save(figure, Path(path) if path else record.folder / "figures" / "curves.png")
    return figure


def plot_runs(runs: Mapping[str, Record], metric: str | None = None, path: str | Path | None = None) -> Picture:
    """One central metric of several runs, in one picture.

    Args:
        runs: name → record; the names are written at the curves.
        metric: by default the first one after the loss that all runs have, else the loss.
        path: where to save the figure; by default it is not saved.

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigurationError: the runs have no evaluated metric in common, or none has the one named.
    """
    canvas = open_canvas()
    name = metric or common_metric(runs)
    _check_drawable(runs, name)
    colours = [canvas.CYCLE[i % len(canvas.CYCLE)] for i in range(len(runs))]
    figure: Picture
    figure, (axes,) = canvas.picture(size=(7.2, 4.2))
    _draw_runs(axes, runs, name, colours)
    canvas.caption(axes, f"Test {name} after each round", x="round", y=f"test {name}")
    if path:
        canvas.save(figure, Path(path))
    return figure


def plot_accuracy_by_partition(
    runs: Mapping[str, Record], path: str | Path | None = None, *, metric: str = "accuracy"
) -> Picture:
    """The second figure of the talk: one curve per way to divide the data among the nodes.

    Args:
        runs: name → record, from the easiest to the hardest: the non-federated run, uniform, skewed, ...
        path: where to save the figure; by default it is not saved.
        metric: what to draw.
    """
    canvas = open_canvas()
    colours = [canvas.BLACK, canvas.GREEN, canvas.ORANGE, canvas.RED, *canvas.CYCLE][: len(runs)]
    figure: Picture
    figure, (axes,) = canvas.picture(size=(8.0, 4.6))
    _draw_runs(axes, runs, metric, colours)
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    canvas.caption(axes, "What skewed data costs", x="round", y=f"test {metric}")
    if path:
        canvas.save(figure, Path(path))
    return figure


def common_metric(runs: Mapping[str, Record]) -> str:
    """The first metric after the loss that all runs have evaluated, else the loss."""
    names = [_names(record.metrics) for record in runs.values()]
    shared = [n for n in names[0] if all(n in other for other in names)] if names else []
    if not shared:
        told = "; ".join(f"{name}: {', '.join(own) or 'none'}" for name, own in zip(runs, names, strict=True))
        raise ConfigurationError(f"these runs have no evaluated metric in common ({told or 'no run given'})")
    return next((n for n in shared if n != "loss"), "loss")


def _check_drawable(runs: Mapping[str, Record], metric: str) -> None:
    """Refuse a metric that no run has, which is a slip; of several runs some may lack it."""
    there = dict.fromkeys(name for record in runs.values() for name in _names(record.metrics))
    if metric not in there:
        raise ConfigurationError(f"no run has evaluated {metric!r}; there is: {', '.join(there) or 'nothing'}")


def open_canvas() -> Any:
    """The module that draws.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from foedus.report import canvas
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "matplotlib", "report", "Drawing a figure") from error
    return canvas


# --- panels -------------------------------------------------------------------------------------------------


def _draw_loss(axes: Any, metrics: Sequence[Mapping[str, Any]], canvas: Any) -> None:
    train, test = curve(metrics, "train_loss"), curve(metrics, "central", "loss")
    lines = [("training", train, canvas.GREY), ("test", test, canvas.GREEN)]
    for _, each, colour in lines:
        axes.plot(*each, color=colour, linewidth=1.8, **_dots(each))
    canvas.log_if_wide(axes, np.concatenate([train.values, test.values]))
    canvas.caption(axes, "Loss", x="round")
    canvas.write_names(axes, [_name(canvas, text, c, colour) for text, c, colour in lines if len(c.rounds)])


def _draw_metric(axes: Any, metrics: Sequence[Mapping[str, Any]], name: str, canvas: Any) -> None:
    central = curve(metrics, "central", name)
    mean, spread, worst = (curve(metrics, "clients", name, part) for part in ("mean", "spread", "worst_decile"))
    lines = [
        ("test", central, canvas.GREEN),
        ("mean client", mean, canvas.BLUE),
        ("worst decile", worst, canvas.RED),
    ]
    if len(mean.rounds):
        band = mean.values - spread.values, mean.values + spread.values
        axes.fill_between(mean.rounds, *band, color=canvas.BLUE, alpha=0.12, linewidth=0)
    for _, each, colour in lines:
        axes.plot(*each, color=colour, linewidth=1.8, **_dots(each))
    canvas.caption(axes, name.replace("_", " ").capitalize(), x="round")
    canvas.write_names(axes, [_name(canvas, text, c, colour) for text, c, colour in lines if len(c.rounds)])


def _draw_bytes(axes: Any, metrics: Sequence[Mapping[str, Any]], canvas: Any) -> None:
    sums = {way: np.cumsum([line[f"bytes_{way}"] for line in metrics], dtype=np.float64) for way in ("down", "up")}
    rounds = np.array([line["round"] for line in metrics], np.float64)
    unit, size = _unit(max(float(s[-1]) for s in sums.values()))
    lines = [
        ("to clients", Curve(rounds, sums["down"] / size), canvas.BLUE),
        ("from clients", Curve(rounds, sums["up"] / size), canvas.ORANGE),
    ]
    if np.array_equal(sums["down"], sums["up"]):
        lines = [("each way", lines[0][1], canvas.BLUE)]
    for _, each, colour in lines:
        axes.plot(*each, color=colour, linewidth=1.8, **_dots(each))
    axes.set_ylim(bottom=0)
    canvas.caption(axes, f"Traffic so far, {unit}", x="round")
    canvas.write_names(axes, [_name(canvas, text, c, colour) for text, c, colour in lines])


def _draw_runs(axes: Any, runs: Mapping[str, Record], metric: str, colours: Sequence[str]) -> None:
    canvas = open_canvas()
    curves = {name: curve(record.metrics, "central", metric) for name, record in runs.items()}
    for each, colour in zip(curves.values(), colours, strict=True):
        axes.plot(*each, color=colour, linewidth=2.0, **_dots(each))
    axes.set_xlim(0, max((c.rounds.max() for c in curves.values() if len(c.rounds)), default=1))
    if all(better(record, metric) is min for record in runs.values()):
        canvas.log_if_wide(axes, np.concatenate([c.values for c in curves.values()]))
    ends = zip(curves.items(), colours, strict=True)
    canvas.write_names(axes, [_name(canvas, n, c, colour) for (n, c), colour in ends if len(c.rounds)])


def _name(canvas: Any, text: str, each: Curve, colour: str) -> Any:
    return canvas.Name(text, float(each.rounds[-1]), float(each.values[-1]), colour)


def _dots(each: Curve) -> dict[str, Any]:
    """Few points are marked: a single one would not be seen otherwise."""
    return {"marker": "o", "markersize": 3.5} if len(each.rounds) <= 25 else {}


# --- reading ------------------------------------------------------------------------------------------------


def _at(line: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = line
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that were evaluated, centrally or per client, in order."""
    found: dict[str, None] = {}
    for line in metrics:
        for part in ("central", "clients"):
            found |= dict.fromkeys(line.get(part, {}))
    return list(found)


def better(record: Record, metric: str) -> Callable[..., Any]:
    """``max`` or ``min``: which way a metric of this run is better."""
    told = record.configuration.get("better", {}).get(metric)
    known: dict[str, Callable[..., Any]] = {"min": min, "max": max}
    return known.get(told, _usually_better(metric))


def _usually_better(metric: str) -> Callable[..., Any]:
    return min if metric in LOWER_IS_BETTER else max


def _unit(count: float) -> tuple[str, float]:
    """The unit that suits a number of bytes, and its size."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return unit, size
    return "bytes", 1.0

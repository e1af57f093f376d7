"""The talk's first figure: what happens to every node's own model between two averagings.

Within a round each node's model is drawn towards its own data, so that its loss on everybody's test data falls
less, or rises; averaging brings all of them back below where they started. A node that trains as much but never
communicates has nobody to bring it back.

The data is ``local.jsonl`` of a run with ``Settings(local_curves=LocalCurves(...))``.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError
from foedus.record import Record
from foedus.record.folder import LOCAL, lines
from foedus.report.curves import Curve, curve, open_canvas

if TYPE_CHECKING:
    from foedus.report.canvas import Picture

DRAWN = 40  # nodes; more would be a grey surface


class LocalSteps(NamedTuple):
    """Curves over local steps since the beginning of the run.

    Attributes:
        nodes: each node's own model; NaN parts the rounds that it took part in from those it did not.
        shared: the federated model, at the beginning of every round and at the end of the last.
    """

    nodes: dict[Any, Curve]
    shared: Curve


def plot_local(
    record: Record, isolated: Record | None = None, path: str | Path | None = None, *, figure: str = "loss"
) -> Picture:
    """Test loss per local step: of every node's own model (grey), of a node that trains as much but never
    communicates (orange), of the federated model (green).

    Args:
        record: a federated run with local curves.
        isolated: a run of one node alone, with as many rounds and local curves of its own.
        path: where to save the figure; by default ``figures/local.png`` in the run folder.
        figure: ``"loss"``, or a metric's name.

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigurationError: the run has no local curves.
    """
    canvas = open_canvas()
    steps = local_steps(record, figure)
    picture: Picture
    picture, (axes,) = canvas.picture(size=(9.0, 4.8))
    axes.set_xlim(0, float(steps.shared.rounds.max()))
    for x in steps.shared.rounds:
        axes.axvline(x, color=canvas.GRID, linewidth=0.8, zorder=0)
    for each in list(steps.nodes.values())[:DRAWN]:
        axes.plot(*each, color=canvas.GREY, linewidth=0.8, alpha=0.75)
    names = [_last(canvas, "each node's own", list(steps.nodes.values()), canvas.FAINT)]
    drawn = [steps.shared, *steps.nodes.values()]
    if isolated is not None:
        alone = _continuous(local_steps(isolated, figure))
        axes.plot(*alone, color=canvas.ORANGE, linewidth=1.6)
        names.append(_last(canvas, "a node alone", [alone], canvas.ORANGE))
        drawn.append(alone)
    axes.plot(*steps.shared, color=canvas.GREEN, linewidth=2.2, marker="o", markersize=4)
    names.append(_last(canvas, "the federated model", [steps.shared], canvas.GREEN))
    canvas.log_if_wide(axes, np.concatenate([c.values for c in drawn]))
    axes.grid(False, axis="x")
    heading = f"Test {figure} while training; the lines mark where the models are averaged"
    canvas.caption(axes, heading, x="local steps", y=f"test {figure}")
    canvas.write_names(axes, names)
    canvas.save(picture, Path(path) if path else record.folder / "figures" / "local.png")
    return picture


def local_steps(record: Record, figure: str = "loss") -> LocalSteps:
    """The curves of ``local.jsonl``: a round begins where the slowest node of the one before ended.

    Raises:
        ConfigurationError: the run has no local curves.
    """
    rounds: dict[int, dict[Any, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines(record.folder / LOCAL):
        value = line.get(figure)
        rounds[line["round"]][line["client"]].append((line["step"], np.nan if value is None else value))
    if not rounds:
        raise ConfigurationError(
            f"{record.folder} has no local curves of {figure!r}. Run it with "
            "Settings(local_curves=LocalCurves(every=1))"
        )
    nodes: dict[Any, list[NDArray[np.float64]]] = defaultdict(list)
    shared: list[tuple[float, float]] = []
    begin, last, before = 0.0, 0, set[Any]()
    for number, clients in sorted(rounds.items()):
        shared.append((begin, float(np.mean([dict(points).get(0, np.nan) for points in clients.values()]))))
        for client, points in clients.items():
            gap = np.full((int(client not in before), 2), np.nan)
            nodes[client] += [gap, np.array(sorted(points), np.float64) + (begin, 0)]
        begin += max(step for points in clients.values() for step, _ in points)
        last, before = number, set(clients)
    shared += [(begin, value) for value in _final(record, figure, last)]
    curves = {client: Curve(*np.concatenate(parts)[1:].T) for client, parts in nodes.items()}
    return LocalSteps(curves, Curve(*np.array(shared).T))


def _final(record: Record, figure: str, last: int) -> list[float]:
    """The federated model after the last round, which no later round's first step tells."""
    found = curve(record.metrics, "central", figure)
    return [float(v) for r, v in zip(found.rounds, found.values, strict=True) if r == last]


def _continuous(steps: LocalSteps) -> Curve:
    """The one node of a run of one node, whose model goes on from round to round."""
    if len(steps.nodes) != 1:
        raise ConfigurationError(
            f"the isolated run has {len(steps.nodes)} nodes; it shows one that never communicates. "
            "Write simulate(task, algorithm, clients.subset([0]), ...)"
        )
    return next(iter(steps.nodes.values()))


def _last(canvas: Any, text: str, curves: list[Curve], colour: str) -> Any:
    """A name beside the middle of the curves' ends."""
    ends = [(c.rounds[-1], c.values[-1]) for c in curves if len(c.rounds)]
    x, y = np.median(np.array(ends), axis=0)
    return canvas.Name(text, float(x), float(y), colour)

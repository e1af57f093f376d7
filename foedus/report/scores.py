"""How every client's updates looked over the rounds of a watched run: the plot of ``scores.jsonl``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foedus.errors import ConfigurationError
from foedus.record import Record
from foedus.report.curves import Curve, open_canvas

if TYPE_CHECKING:
    from foedus.report.canvas import Picture

SUSPECTS = 6  # named in colour; more would be a bundle


def plot_scores(record: Record, path: str | Path | None = None, *, figure: str = "current") -> Picture:
    """One line per client over rounds: grey, or in colour those whose updates were refused most often.

    Args:
        record: of a run with ``Settings(watch=...)``.
        path: where to save the figure; by default ``figures/scores.png`` in the run folder.
        figure: "current", "previous", "norm" or "loss", see :class:`foedus.core.scores.Score`.

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigurationError: the run was not watched, or has no such figure.
    """
    canvas = open_canvas()
    curves, refused = score_curves(record, figure)
    suspects = sorted((c for c in curves if refused[c]), key=lambda c: (-refused[c], str(c)))[:SUSPECTS]
    picture: Picture
    picture, (axes,) = canvas.picture(size=(8.0, 4.4))
    for client in sorted(curves, key=lambda c: c in suspects):
        known = client in suspects
        colour = canvas.CYCLE[1 + suspects.index(client)] if known else canvas.GREY
        axes.plot(*curves[client], color=colour, linewidth=1.4 if known else 0.8, marker=".", markersize=4)
    names = [
        canvas.Name(f"{c}, refused {refused[c]} times", float(curves[c].rounds[-1]), float(curves[c].values[-1]),
                    canvas.CYCLE[1 + suspects.index(c)])
        for c in suspects
    ]  # fmt: skip
    canvas.caption(axes, _HEADINGS[figure], x="round", y=figure)
    canvas.write_names(axes, names)
    canvas.save(picture, Path(path) if path else record.folder / "figures" / "scores.png")
    return picture


_HEADINGS = {
    "current": "Which way each update pointed: its cosine to the model's movement",
    "previous": "Which way each update pointed: its cosine to the model's last movement",
    "norm": "How long each update was",
    "loss": "How much each update alone raises the loss on the server's examples",
}


def score_curves(record: Record, figure: str = "current") -> tuple[dict[Any, Curve], dict[Any, int]]:
    """Each client's figure over the rounds it took part in, and how often it was refused.

    Raises:
        ConfigurationError: the run was not watched, or has no such figure.
    """
    points: dict[Any, list[tuple[int, float]]] = defaultdict(list)
    refused: dict[Any, int] = defaultdict(int)
    for line in record.scores:
        if line.get(figure) is not None:
            points[line["client"]].append((line["round"], line[figure]))
        refused[line["client"]] += line["refused"]
    if not points:
        known = ", ".join(_HEADINGS)
        raise ConfigurationError(
            f"{record.folder} has no scores of {figure!r} (there are: {known}). Run it with "
            "Settings(watch=foedus.Watch())"
        )
    return {c: Curve(*np.array(p, np.float64).T) for c, p in points.items()}, refused

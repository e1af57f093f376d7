"""What a plan costs in privacy, as a figure: ε over the rounds, by each accountant.

Not here: what it costs (``foedus.privacy``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foedus.privacy.claims import Point
from foedus.report.curves import open_canvas

if TYPE_CHECKING:
    from foedus.report.canvas import Picture


def plot_epsilon(curves: Mapping[str, Sequence[Point]], path: str | Path, *, delta: float) -> Picture:
    """ε over the rounds.

    Args:
        curves: points by name, as ``foedus.privacy.curve`` gives them.
        path: where to save the figure.
        delta: δ, for the caption.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    canvas = open_canvas()
    figure: Picture
    figure, (axes,) = canvas.picture(size=(7.2, 4.2))
    for (name, points), colour in zip(curves.items(), canvas.CYCLE, strict=False):
        rounds, costs = [0, *(p.round for p in points)], [0.0, *(p.epsilon for p in points)]
        axes.plot(rounds, costs, color=colour, label=name)
    axes.set_ylim(0)
    axes.legend(frameon=False)
    canvas.caption(axes, f"ε over the rounds, at δ = {delta:g}", x="round", y="ε")
    canvas.save(figure, Path(path))
    return figure

"""How our figures look: one palette, quiet axes, names written at the ends of the curves instead of a legend.

Figures are made through matplotlib's object interface: no global state, no window, and drawing works headless
and in threads. This file alone imports matplotlib; it is imported when something is drawn.

Not here: what is drawn (``curves.py``, ``local.py``).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from foedus.errors import ConfigurationError
from foedus.record import files

INK, FAINT, GRID = "#22262b", "#7a828c", "#e6e8eb"
GREY, ORANGE, GREEN, BLUE, RED, VIOLET, BLACK = (
    "#a9b0b8", "#e07b00", "#12905a", "#2467b3", "#c8372d", "#7d51a8", "#30353b"
)  # fmt: skip
CYCLE = (BLUE, ORANGE, GREEN, RED, VIOLET, "#0f8b99", "#8a6d1f", "#b0478f", BLACK)
DPI = 160


class Picture(Figure):
    """A matplotlib figure that notebooks show even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


class Name(NamedTuple):
    """A curve's name, written where the curve ends."""

    text: str
    x: float
    y: float
    colour: str


def picture(panels: int = 1, *, size: tuple[float, float] | None = None, title: str = "") -> tuple[Picture, list[Any]]:
    """An empty figure and its axes, at most four in a row; ``size`` in inches."""
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure = Picture(
        figsize=size or (4.4 * columns, 3.5 * rows), dpi=100, layout="constrained", facecolor="white"
    )  # fmt: skip
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for spare in axes[panels:]:
        spare.remove()
    for each in axes[:panels]:
        quiet(each)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure, axes[:panels]


def quiet(axes: Any) -> None:
    """No frame but the two axes, a faint grid, small dark numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def caption(axes: Any, title: str, *, x: str = "", y: str = "") -> None:
    """A heading at the left, and the names of the axes."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(x, fontsize=9, color=FAINT)
    axes.set_ylabel(y, fontsize=9, color=FAINT)


def log_if_wide(axes: Any, values: Sequence[float] | NDArray[Any], *, ratio: float = 20.0) -> None:
    """A logarithmic y axis where positive values span more than ``ratio``."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if len(known) and known.min() > 0 and known.max() / known.min() > ratio:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def write_names(axes: Any, names: Sequence[Name], *, size: float = 9.0) -> None:
    """Write the names to the right of the axes, each at the height of its curve's end, pushed apart where they
    would overlap. Call it last: it needs the final limits of the y axis."""
    if not names:
        return
    # Heights in points are only known once the layout is; this figure's is constrained, so it is drawn first.
    axes.figure.canvas.draw()
    _, low, _, high = (float(v) for v in axes.get_window_extent().extents)
    pixel = axes.figure.dpi / 72
    at = [float(axes.transData.transform((n.x, n.y))[1]) for n in names]
    wanted = np.clip(at, low, high)
    heights = apart(wanted, 1.25 * size * pixel, low=low, high=high)
    edge = axes.get_xlim()[1]
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            name.text, (edge, axes.transData.inverted().transform((0, height))[1]), xytext=(5, 0),
            textcoords="offset points", va="center", ha="left", fontsize=size, color=name.colour,
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def apart(at: Sequence[float] | NDArray[Any], gap: float, *, low: float, high: float) -> NDArray[np.float64]:
    """Positions near ``at`` [name], in the same order, at least ``gap`` apart, within the limits if they fit:
    the least change in squares (isotonic regression by pooling neighbours, as gaps make it one).

    Example:
        >>> apart([1.0, 1.0, 9.0], 2.0, low=0.0, high=10.0).tolist()
        [0.0, 2.0, 9.0]
    """
    wanted = np.asarray(at, np.float64)
    order = np.argsort(wanted, kind="stable")
    # With y_i = z_i + i·gap the condition is that z does not fall: pool adjacent violators.
    blocks: list[list[float]] = []
    for rank, value in enumerate(wanted[order]):
        blocks.append([value - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, weight), (last, more) = blocks[-2], blocks.pop()
            blocks[-1] = [(mean * weight + last * more) / (weight + more), weight + more]
    z = np.concatenate([np.full(int(w), m) for m, w in blocks]) if blocks else np.empty(0)
    z = np.clip(z, low, max(low, high - gap * (len(wanted) - 1)))
    placed = np.empty_like(wanted)
    placed[order] = z + gap * np.arange(len(wanted))
    return placed


def save(figure: Figure, path: Path) -> None:
    """Write the figure as the file name's ending says (png, pdf, svg).

    Raises:
        ConfigurationError: no such kind of file is known.
        StorageError: it could not be written.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ConfigurationError(f"a figure cannot be written as {path.name!r}; name it .png, .pdf or .svg")
    with files.storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)

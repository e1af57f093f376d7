"""The picture of a partition: who has how much of what.

Few clients and classes: one row per client, one bubble per class, its area the number of examples. Many
clients: one stacked bar per client. Numbers instead of classes (regression): each client's median and middle
half. Clients are sorted so that like stands beside like. A large population is shown by an even sample, and
the title says so.

Colours are Paul Tol's "muted" scheme, which the colour-blind can tell apart; bubbles need no colours at all.

Not here: figures of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import Clients
from foedus.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_partition"]

_BUBBLE_CLIENTS: Final = 30  # more than this many rows of bubbles cannot be read
_SHOWN: Final = 400  # bars thinner than this cannot be told apart
_CLASSES: Final = 30
_BUBBLE: Final = 25  # points across, so that neighbours do not touch
_MUTED: Final = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499",
    "#BBBBBB",
)  # fmt: skip
_INK, _BLUE, _FAINT = "#333333", "#4477AA", "#DDDDDD"


class _Shown(NamedTuple):
    """What is drawn, client by client in the order of the picture."""

    names: list[str]
    targets: list[NDArray[Any]]
    population: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([len(t) for t in self.targets])


def plot_partition(
    clients: Clients,
    path: str | Path | None = None,
    *,
    classes: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw which client has how many training examples of which class.

    Args:
        clients: any population; of one with more than 400 clients an even sample is drawn.
        path: where to save the figure (.png, .svg, .pdf); None: nowhere.
        classes: names to show instead of the classes' numbers, such as `Dataset.classes`.
        title: default: how many clients and examples there are.

    Returns:
        a matplotlib figure.

    Errors: `MissingExtra` without matplotlib.

    >>> from foedus.data import digits, by_class  # doctest: +SKIP
    >>> plot_partition(digits().partition(by_class(10, share=0.9)), "partition.png")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "plot_partition()") from error
    shown = _sampled(clients)
    numbers = np.unique(np.concatenate([t.ravel() for t in shown.targets]))
    flat = all(t.ndim == 1 for t in shown.targets)
    figure = Figure(figsize=(9, 5), layout="constrained")
    if flat and numbers.dtype.kind in "iub" and 0 < len(numbers) <= _CLASSES:
        counts = np.array([[(t == n).sum() for n in numbers] for t in shown.targets])
        labels = [classes[n] if 0 <= n < len(classes) else str(n) for n in numbers]
        if len(shown.names) <= _BUBBLE_CLIENTS:
            _bubbles(figure, shown, counts, labels)
        else:
            _bars(figure, counts, labels)
    elif flat and len(numbers):
        _ranges(figure, shown)
    else:
        axes = figure.subplots()
        _sizes(axes, np.sort(shown.sizes)[::-1])
        axes.set_xlabel("clients, sorted by size")
    figure.suptitle(title or _title(clients, shown), fontsize=12, color=_INK, ha="left", x=0.01)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _sampled(clients: Clients) -> _Shown:
    """An even sample of the clients."""
    chosen = np.unique(np.linspace(0, len(clients) - 1, min(len(clients), _SHOWN)).astype(int)).tolist()
    if clients.pool is None:
        targets = [clients.train(i).targets for i in chosen]
    else:  # without touching the inputs
        pool, rows = clients.pool
        targets = [pool.targets[rows[i]] for i in chosen]
    return _Shown([str(clients.ids[i]) for i in chosen], targets, len(clients))


def _title(clients: Clients, shown: _Shown) -> str:
    count = f"{len(clients):,} clients" if len(clients) > 1 else "one client"
    examples = "" if clients.sizes is None else f", {int(clients.sizes.sum()):,} training examples"
    sample = "" if len(shown.names) == len(clients) else f" (an even sample of {len(shown.names)} is shown)"
    return count + examples + sample


def _bubbles(figure: Figure, shown: _Shown, counts: NDArray[np.int64], labels: Sequence[str]) -> None:
    """One row per client, one bubble per class, and the sizes as bars at the right."""
    rows, columns = counts.shape
    figure.set_size_inches(min(3.6 + 0.55 * columns, 16), min(1.8 + 0.36 * rows, 14))
    grid, side = figure.subplots(1, 2, sharey=True, width_ratios=[max(columns, 4), 2.5])
    y, x = np.nonzero(counts)
    largest = int(counts.max(initial=1))
    grid.scatter(x, y, s=_BUBBLE**2 * counts[y, x] / largest, color=_BLUE, linewidth=0, zorder=2)
    grid.set(xlim=(-0.7, columns - 0.3), ylim=(rows - 0.4, -0.6), ylabel="client")
    grid.set_xlabel(f"class (area: examples, the largest bubble {largest:,})")
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 3 else {}
    grid.set_xticks(range(columns), labels, **slant)
    grid.set_yticks(range(rows), [_short(n) for n in shown.names])
    grid.grid(color=_FAINT, linewidth=0.6)
    side.barh(range(rows), shown.sizes, color=_FAINT, height=0.7)
    for row, size in enumerate(shown.sizes):
        side.annotate(f" {size:,}", (0, row), va="center", fontsize=9, color=_INK)
    side.set(xlabel="examples", xticks=[])
    _plain(grid, side)


def _bars(figure: Figure, counts: NDArray[np.int64], labels: Sequence[str]) -> None:
    """One stacked bar per client with the shares of its classes, and the sizes below.

    Where clients have a main class, bars are sorted by it and it stands at the bottom; else by size.
    """
    from matplotlib.patches import Patch

    sizes = counts.sum(axis=1)
    share = counts / np.maximum(sizes, 1)[:, None]
    skewed = share.max(axis=1)[sizes > 0].mean() > 0.4
    ranked = np.argsort(-share, axis=1, kind="stable") if skewed else np.tile(np.arange(len(labels)), (len(share), 1))
    main, second = ranked[:, 0], ranked[:, min(1, len(labels) - 1)]
    order = np.lexsort((-share.max(axis=1), second, main)) if skewed else np.argsort(-sizes, kind="stable")
    figure.set_size_inches(10, 5.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    colours, bottom, x = np.array(_palette(len(labels)), object), np.zeros(len(order)), np.arange(len(order))
    for column in ranked[order].T:
        height = 100 * share[order, column]
        above.bar(x, height, bottom=bottom, width=1, color=colours[column].tolist(), linewidth=0)
        bottom += height
    above.set(ylim=(0, 100), ylabel="share of each class, %")
    patches = [Patch(color=c, label=label) for c, label in zip(colours, labels, strict=True)]
    above.legend(
        handles=patches, title="class", loc="upper left", bbox_to_anchor=(1, 1), frameon=False,
        ncols=1 + (len(labels) > 15), handlelength=1, handleheight=1,
    )  # fmt: skip
    _sizes(below, sizes[order])
    below.set_xlabel("clients, sorted by their main class" if skewed else "clients, sorted by size")
    _plain(above)


def _ranges(figure: Figure, shown: _Shown) -> None:
    """Median and middle half of each client's targets, sorted by the median; sizes below."""
    full = [t for t in shown.targets if len(t)]
    quartiles = np.array([np.quantile(t, [0.25, 0.5, 0.75]) for t in full])
    order = np.argsort(quartiles[:, 1], kind="stable")
    low, middle, high = quartiles[order].T
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = np.arange(len(order))
    above.vlines(x, low, high, color=_BLUE, alpha=0.45, linewidth=max(1.0, min(8, 300 / len(order))))
    above.scatter(x, middle, color=_INK, s=max(4, min(30, 1200 / len(order))), zorder=2)
    above.set(ylabel="target: median, middle half")
    _sizes(below, np.array([len(full[i]) for i in order]))
    below.set(xlabel="clients, sorted by the median")
    _plain(above)


def _sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    axes.bar(range(len(sizes)), sizes, width=0.9 if len(sizes) < 100 else 1, color=_BLUE, linewidth=0)
    axes.set(xlim=(-0.5, len(sizes) - 0.5), xticks=[], xlabel="clients", ylabel="examples")
    _plain(axes)


def _palette(count: int) -> list[Any]:
    if count <= len(_MUTED):
        return list(_MUTED[:count])
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0, 1, count))]


def _plain(*panels: Axes) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0, colors=_INK)
        axes.set_axisbelow(True)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:22] + "…"

"""Figures of attacks: rebuilt examples beside the originals, canaries beside chance, how well members are told.

Not here: the attacks (``foedus.audit``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foedus.report.curves import open_canvas

if TYPE_CHECKING:
    from foedus.report.canvas import Picture as Drawn

Array = NDArray[Any]
SHOWN = 8  # examples of a batch


def plot_audit(arrays: Mapping[str, Array], folder: Path) -> list[Path]:
    """Draw what an audit kept; the files' paths.

    Args:
        arrays: by name, as the audit's parts name them.
        folder: where the figures go.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    drawn: list[Path] = []
    names = [n.removesuffix(" original") for n in arrays if n.startswith("inversion") and n.endswith(" original")]
    pairs = {name: (arrays[f"{name} original"], arrays[f"{name} rebuilt"]) for name in names}
    if pictures := {name: both for name, both in pairs.items() if _as_pictures(both[0]) is not None}:
        rows = {
            f"{n.removeprefix('inversion ')}: {w}": b[i]
            for n, b in pictures.items()
            for i, w in enumerate(("original", "rebuilt"))
        }
        drawn.append(plot_pictures(rows, folder / "inversion.png"))
    seen = {n.removeprefix("canaries "): a for n, a in arrays.items() if n.startswith("canaries ")}
    if seen:
        both = {name: (values, arrays[f"directions {name}"]) for name, values in seen.items()}
        drawn.append(plot_canaries(both, folder / "canaries.png"))
    if "membership inside" in arrays:
        drawn.append(plot_members(arrays["membership inside"], arrays["membership outside"], folder / "membership.png"))
    return drawn


def plot_pictures(rows: Mapping[str, Array], path: Path) -> Path:
    """Rows of pictures [k, channels, height, width], [k, height, width], each row with its name on the left.

    Example:
        >>> plot_pictures({"original": np.zeros((2, 8, 8))}, Path("p.png"))
        PosixPath('p.png')
    """
    canvas = open_canvas()
    count = min(SHOWN, max(len(row) for row in rows.values()))
    figure: Drawn
    figure, axes = canvas.picture(1, size=(2.6 + 0.5 * count, 0.54 * len(rows)))
    axes[0].remove()
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, row) in zip(grid, rows.items(), strict=True):
        pictures = _as_pictures(row)
        for place, one in enumerate(line):
            one.set_axis_off()
            if pictures is not None and place < len(pictures):
                one.imshow(pictures[place], cmap="gray", vmin=float(row.min()), vmax=float(row.max()))
        line[0].text(
            -0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8, color=canvas.INK
        )
    canvas.save(figure, path)
    return path


def plot_canaries(seen: Mapping[str, tuple[Array, Array]], path: Path) -> Path:
    """How far canaries stand out from directions that nobody sent, for each observer.

    Args:
        seen: by observer, the statistic of canaries and of other directions, in units of chance.
        path: where to save it.
    """
    canvas = open_canvas()
    figure: Drawn
    figure, axes = canvas.picture(len(seen))
    for one, (name, (observed, unseen)) in zip(axes, seen.items(), strict=True):
        both = np.concatenate([observed, unseen])
        bins = np.linspace(both.min(), both.max() + 1e-9, 40)
        one.hist(unseen, bins, density=True, color=canvas.GREY, label="nobody's")
        one.hist(observed, bins, density=True, color=canvas.ORANGE, alpha=0.7, label="canaries")
        canvas.caption(one, name, x="standard deviations from chance", y="density")
        one.legend(frameon=False, fontsize=8, loc="upper center")
    canvas.save(figure, path)
    return path


def plot_members(inside: Array, outside: Array, path: Path) -> Path:
    """Members found against others accused, on logarithmic axes, where the few who can be told for sure show.

    Args:
        inside, outside: scores of members and of others; more means "member".
        path: where to save it.
    """
    canvas = open_canvas()
    levels = np.unique(np.concatenate([inside, outside]))[::-1]
    found, false = (1 - np.searchsorted(np.sort(s), levels, side="left") / len(s) for s in (inside, outside))
    figure: Drawn
    figure, (axes,) = canvas.picture()
    least = 1 / max(len(inside), len(outside))
    axes.plot([least, 1], [least, 1], color=canvas.GREY, linewidth=1)
    axes.plot(np.maximum(false, least), np.maximum(found, least), color=canvas.ORANGE, linewidth=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    canvas.caption(axes, "Members found (grey: guessing)", x="others accused", y="members found")
    canvas.save(figure, path)
    return path


def _as_pictures(examples: Array) -> Sequence[Array] | None:
    """Examples as pictures, [height, width] or [height, width, 3]; ``None`` where they are none."""
    if examples.ndim == 3 and min(examples.shape[1:]) >= 6:
        return list(examples)
    if examples.ndim != 4 or min(examples.shape[2:]) < 6:
        return None
    if examples.shape[1] == 3:
        return [np.clip(e.transpose(1, 2, 0), 0, 1) for e in examples]
    return [e[0] for e in examples]

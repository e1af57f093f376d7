"""What the experiment scripts share: where runs lie, how a result is stored, how a table is printed.

Every training run has its own folder under ``experiments/runs/`` (not committed), so that a script which is
started again goes on where it was stopped. What comes out is small and is committed: ``results/*.json``, and
figures under ``docs/experiments/``.

Not here: anything about federated learning.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS, RESULTS, DOCS = HERE / "runs", HERE / "results", HERE.parent / "docs" / "experiments"


def run_folder(*names: str) -> Path:
    """A folder of its own for a run, e.g. ``run_folder("mcmahan", "2nn iid B=10")``."""
    return RUNS.joinpath(*(re.sub(r"[^\w.=+-]+", "_", name) for name in names))


def store(name: str, values: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"stored {path.relative_to(HERE.parent)}")
    return path


def stored(name: str) -> dict[str, Any]:
    """What ``results/<name>.json`` holds; empty if it is not there."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def figure_path(name: str) -> Path:
    """Where a figure of the docs belongs."""
    DOCS.mkdir(parents=True, exist_ok=True)
    return DOCS / f"{name}.png"


def document(page: str, text: str, *, mark: str = "table") -> None:
    """Print a table and put it into ``docs/experiments/<page>.md``, between ``<!-- table -->`` and ``<!-- end -->``."""
    print(f"\n{text}\n")
    path = DOCS / f"{page}.md"
    before, begin, rest = path.read_text("utf-8").partition(f"<!-- {mark} -->\n")
    after = rest.partition("<!-- end -->")
    path.write_text(f"{before}{begin}\n{text}\n\n{after[1]}{after[2]}", "utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns; numbers are shown with three or four digits."""
    cells = [list(header), *([shown(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """What is stored of one figure of several seeds."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "all": list(values)}


def with_deviation(figure: Mapping[str, Any]) -> str:
    """Mean and standard deviation over seeds, as a cell."""
    return f"{figure['mean']:.3f} ± {figure['deviation']:.3f}"


def wanted(name: str, only: Sequence[str]) -> bool:
    """Whether ``--only`` (any number of parts of names) asks for this one."""
    return not only or any(part.lower() in name.lower() for part in only)

"""Tables for the terminal and for notebooks, in one style (rich)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

LONG = 24  # characters; columns of such texts may be wrapped


def table(rows: Sequence[Mapping[str, Any]], *, title: str = "", best: int | None = None, notes: str = "") -> Table:
    """A rich table of dicts; columns in the order in which they first occur, numbers to the right.

    Args:
        rows: column → value; what a row lacks is left blank. Floats are shown with four digits.
        title: above the table.
        best: the number of a row to set off, in bold green with a star.
        notes: below the table.

    Example:
        >>> print(plain(table([{"run": "a", "accuracy": 0.91234}, {"run": "b"}])))
        run  accuracy
        a      0.9123
        b
    """
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(title) if title else None, caption=Text(notes) if notes else None,
        box=None, pad_edge=False, padding=(0, 2, 0, 0),
        title_justify="left", caption_justify="left", header_style="bold", title_style="bold",
    )  # fmt: skip
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        numbers = [row[name] for row in rows if row.get(name) is not None]
        right = bool(numbers) and all(isinstance(v, int | float) for v in numbers)
        words = any(" " in str(row.get(name, "")) and len(str(row.get(name, ""))) > LONG for row in rows)
        drawn.add_column(Text(name), justify="right" if right else "left", overflow="fold", no_wrap=not words)
    if best is not None:
        drawn.add_column("")
    for number, row in enumerate(rows):
        cells = [Text(shown(row.get(name))) for name in columns]  # no markup: brackets are the user's own
        mark = [] if best is None else ["★ best" if number == best else ""]
        drawn.add_row(*cells, *mark, style="bold green" if number == best else None)
    return drawn


def shown(value: Any) -> str:
    """A value as a cell: floats with four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def bytes_shown(count: float) -> str:
    """A number of bytes with its unit.

    Example:
        >>> bytes_shown(1_230_000)
        '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show(drawn: Table, *, whole: bool = False) -> None:
    """Print the table: to a terminal or notebook as wide as that is; to a file or pipe, or if the ``whole`` is
    asked for, in lines as long as they are."""
    from rich.console import Console

    console = Console()
    if not whole and (console.is_terminal or console.is_jupyter):
        console.print(drawn)
    else:
        print(plain(drawn))


def plain(drawn: Table, *, width: int = 200) -> str:
    """The table as text without colours, for files and ``repr``."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())

"""What docs/protocol.md shows of the protocol, drawn from its tables: run this when a message or a machine changes.

    python docs/protocol_drawn.py

It writes the pictures of both machines, and the tables of messages, codes and moves between the page's marks. A test
(tests/protocol/test_page.py) fails while they are stale.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from foedus.errors import Code
from foedus.protocol import messages, round, session
from foedus.protocol.messages import ANSWERS, KINDS, Blob, Long, Standing, Window, Within

HERE = Path(__file__).parent
PAGE = HERE / "protocol.md"

# Where the phases stand, in columns and rows.
ROUND = {
    "idle": (0, 0),
    "selecting": (1, 0),
    "training": (2, 0),
    "aggregating": (2, 1),
    "failed": (1, 1),
    "over": (0, 1),
}
SESSION = {
    "resting": (0, 0), "asking": (1, 0), "checking in": (2, 0), "fetching": (3, 0), "training": (3, 1),
    "placing": (2, 1), "encoding": (3, 2), "sending": (2, 2), "submitting": (1, 2), "finishing": (1, 1), "over": (0, 2),
}  # fmt: skip
WIDE, HIGH, BOX_W, BOX_H, EDGE = 250, 150, 110, 40, 30
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24324a}.t{font-weight:600}.s{font-size:10.5px;fill:#5a6b86}"
    ".p{fill:#e8eefc;stroke:#3b5bdb;stroke-width:1.5}.a{stroke:#9aa7bd;stroke-width:1.2;fill:none;marker-end:url(#m)}"
)


def picture(title: str, places: Mapping[str, tuple[int, int]], table: Iterable[Any]) -> str:
    """A machine: its phases as boxes, and what leads from one to another."""
    edges: dict[tuple[str, str], list[str]] = {}
    for row in table:
        for to in row.to:
            if to is not row.phase:
                edges.setdefault((str(row.phase), str(to)), []).append(row.event.__name__)
    width = (1 + max(x for x, _ in places.values())) * WIDE
    height = (1 + max(y for _, y in places.values())) * HIGH
    parts = [_edge(places[a], places[b], sorted(set(names))) for (a, b), names in edges.items()]
    parts += [_box(name, *_middle(at)) for name, at in places.items()]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><rect width="{width}" height="{height}" rx="10" '
        f'fill="#fbfcff"/><style>{STYLE}</style><defs><marker id="m" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#9aa7bd"/></marker></defs>'
    )
    return head + "".join(parts) + "</svg>\n"


def _middle(at: tuple[int, int]) -> tuple[float, float]:
    return (at[0] + 0.5) * WIDE, (at[1] + 0.5) * HIGH


def _box(name: str, x: float, y: float) -> str:
    rect = f'<rect class="p" x="{x - BOX_W / 2}" y="{y - BOX_H / 2}" width="{BOX_W}" height="{BOX_H}" rx="6"/>'
    return f'{rect}<text class="t" x="{x}" y="{y + 5}" text-anchor="middle">{escape(name)}</text>'


def _edge(a: tuple[int, int], b: tuple[int, int], names: list[str]) -> str:
    """A curve that bends to its own left, so that there and back are two."""
    (x1, y1), (x2, y2) = _middle(a), _middle(b)
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    bend = EDGE + length / 12
    mx, my = (x1 + x2) / 2 - uy * bend, (y1 + y2) / 2 + ux * bend
    start, end = _border(x1, y1, mx, my), _border(x2, y2, mx, my)
    lx, ly = (x1 + x2) / 2 - uy * bend * 0.62, (y1 + y2) / 2 + ux * bend * 0.62
    path = f'<path class="a" d="M{start[0]:.0f} {start[1]:.0f}Q{mx:.0f} {my:.0f} {end[0]:.0f} {end[1]:.0f}"/>'
    top = ly - 5.5 * (len(names) - 1) + 3
    lines = "".join(
        f'<text class="s" x="{lx:.0f}" y="{top + 11 * i:.0f}" text-anchor="middle">{name}</text>'
        for i, name in enumerate(names)
    )
    return path + lines


def _border(x: float, y: float, mx: float, my: float) -> tuple[float, float]:
    """Where the line from a box's middle towards a point leaves the box."""
    dx, dy = mx - x, my - y
    scale = min(BOX_W / 2 / abs(dx) if dx else 9e9, BOX_H / 2 / abs(dy) if dy else 9e9)
    return x + dx * scale, y + dy * scale


# --- tables ---------------------------------------------------------------------------------------------------


def kind_of(hint: Any) -> str:
    """A field's type and bounds, in words."""
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return f"{kind_of(next(t for t in inner if t is not type(None)))}, or nothing"
    if origin is tuple:
        return f"{_range(bound)} of: {kind_of(inner[0])}"
    if origin is Mapping:
        return f"map, {_range(bound)}: {kind_of(inner[0])} → {kind_of(inner[1])}"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint.__name__
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", bytes: "bytes"}
    name = names.get(hint, getattr(hint, "__name__", str(hint)))
    return f"{name} {_range(bound)}".strip()


def _range(bound: Within | Long | None) -> str:
    if bound is None:
        return ""
    low, high = (_number(b) for b in bound)
    if low == high:
        return f"({low})"
    return f"({low} – {high})"


def _number(value: float) -> str:
    for power in (64, 63, 53, 40):
        for whole, text in ((2**power, f"2^{power}"), (2**power - 1, f"2^{power} − 1"), (-(2**power), f"−2^{power}")):
            if value == whole:
                return text
    return f"{value:g}" if value < 10**6 or value == 10**9 else str(value)


def message_tables() -> str:
    """Every message with its fields."""
    parts = []
    for name, kind in [*KINDS.items(), *((k.__name__, k) for k in (Blob, Window, Standing))]:
        hints = get_type_hints(kind, include_extras=True)
        title = f"`{name}`" if name in KINDS else f"{name} (within others)"
        parts.append(f"#### {title}\n\n| field | type (bounds) | if it is missing |\n|---|---|---|")
        parts += [f"| `{f.name}` | {kind_of(hints[f.name])} | {_default(f)} |" for f in fields(kind)]
        parts.append("")
    return "\n".join(parts)


def _default(f: Any) -> str:
    if f.default is not MISSING:
        plain = str(f.default) if isinstance(f.default, StrEnum) else f.default
        words = {"": "empty", b"": "empty", (): "none", None: "nothing"}
        return str(words.get(plain, f"`{plain}`")) if not isinstance(plain, tuple) or not plain else f"`{plain[0]}`"
    return "malformed" if f.default_factory is MISSING else "none"


def answer_table() -> str:
    """What answers what."""
    names = {kind: name for name, kind in KINDS.items()}
    rows = [f"| `{names[asked]}` | {', '.join(f'`{names[k]}`' for k in found)} |" for asked, found in ANSWERS.items()]
    return "\n".join(["| request | answers (and `problem`) |", "|---|---|", *rows, ""])


def enum_table() -> str:
    """The words that fields of a few values take."""
    kinds = (messages.Kind, messages.Why, messages.Stands, messages.Event)
    rows = [f"| {k.__name__} | {', '.join(f'`{v}`' for v in k)} |" for k in kinds]
    rows.append(f"| Code | {', '.join(f'`{v}`' for v in Code)} |")
    return "\n".join(["| type | values |", "|---|---|", *rows, ""])


def machine_table(module: types.ModuleType) -> str:
    """What may happen in which phase."""
    rows = [f"| {r.phase} | {r.event.__name__} | {', '.join(r.to)} |" for r in module.TABLE]
    return "\n".join(["| in | this event | leads to |", "|---|---|---|", *rows, ""])


def drawn() -> dict[Path, str]:
    """Every file that is made here, as it should be."""
    parts = {
        "messages": message_tables(), "answers": answer_table(), "values": enum_table(),
        "round": machine_table(round), "session": machine_table(session),
    }  # fmt: skip
    page = PAGE.read_text("utf-8")
    for name, text in parts.items():
        mark = re.compile(rf"(<!-- drawn: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(page), f"the page has no place for {name}"
        page = mark.sub(lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}", page)  # type: ignore[misc]
    return {
        PAGE: page,
        HERE / "pictures" / "protocol-round.svg": picture("The server's round", ROUND, round.TABLE),
        HERE / "pictures" / "protocol-session.svg": picture("A client's session", SESSION, session.TABLE),
    }


if __name__ == "__main__":
    for path, text in drawn().items():
        path.write_text(text, "utf-8")

"""What training by DP-SGD has cost the single examples of this owner's data, in all runs of all servers.

A file in the owner's folder, of rows by data set and run: noise multiplier, rate, steps. A visit is written down before
anything that it made may leave; bytes that are sent again are the same visit. It is never made less: neither a
withdrawal of consent nor a run's end takes back what was said.

Not here: what rows are worth (``foedus.privacy.examples``, which the training process asks).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from foedus.net.locks import in_turn
from foedus.net.owner.tallies import read_tally, write_tally

__all__ = ["Row", "Rows", "Spending"]


class Row(NamedTuple):
    """So many steps of one kind."""

    noise_multiplier: float
    rate: float
    steps: int


class Rows(NamedTuple):
    """What a data set's examples have spent in one run, and in all, in the order in which they first did."""

    here: tuple[Row, ...] = ()
    all: tuple[Row, ...] = ()


class Spending:
    """The file.

    Example:
        >>> import tempfile
        >>> spending = Spending(Path(tempfile.mkdtemp()) / "spending.json")
        >>> spending.add("heart", "https://a study", Row(1.1, 0.1, 30))
        >>> spending.add("heart", "https://a study", Row(1.1, 0.1, 30))
        >>> spending.rows("heart", "https://a study").here
        (Row(noise_multiplier=1.1, rate=0.1, steps=60),)
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self, data: str, run: str) -> Rows:
        """What was spent of a data set's examples."""
        runs = self._read().get(data, {})
        return Rows(runs.get(run, ()), tuple(row for rows in runs.values() for row in rows))

    def add(self, data: str, run: str, row: Row) -> None:
        """Count a visit; it is on the disk when this returns."""
        with in_turn(self._path.with_name(self._path.name + ".lock")):
            found = self._read()
            rows = {(z, rate): steps for z, rate, steps in found.setdefault(data, {}).get(run, ())}
            kind = row.noise_multiplier, row.rate
            rows[kind] = rows.get(kind, 0) + row.steps
            found[data][run] = tuple(Row(*kind, steps) for kind, steps in rows.items())
            write_tally(self._path, found)

    def _read(self) -> dict[str, dict[str, tuple[Row, ...]]]:
        return read_tally(
            self._path, _rows, lost="It says what single examples have spent: restore it from a copy. Without it "
            "nothing is trained, since too much could be",
        )  # fmt: skip


def _rows(told: list[list[float]]) -> tuple[Row, ...]:
    return tuple(map(_row, told))


def _row(told: list[float]) -> Row:
    noise_multiplier, rate, steps = told
    if not (0 < noise_multiplier < math.inf and 0 < rate <= 1 and steps >= 0 and steps == int(steps)):
        raise ValueError(f"{told} is no row")
    return Row(float(noise_multiplier), float(rate), int(steps))

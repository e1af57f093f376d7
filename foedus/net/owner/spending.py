"""What training by DP-SGD has cost the single examples of this owner's data, in all runs of all servers.

A file in the owner's folder, of rows by data set and run: noise multiplier, rate, steps. A visit is written down before
anything that it made may leave; bytes that are sent again are the same visit. It is never made less: neither a
withdrawal of consent nor a run's end takes back what was said.

Not here: what rows are worth (``foedus.privacy.examples``, which the training process asks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from foedus.errors import CheckpointError
from foedus.net.locks import in_turn
from foedus.record.files import replace

__all__ = ["Row", "Rows", "Spending"]

VERSION = 1


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
            found = {name: dict(runs) for name, runs in self._read().items()}
            rows = {(z, rate): steps for z, rate, steps in found.setdefault(data, {}).get(run, ())}
            kind = row.noise_multiplier, row.rate
            rows[kind] = rows.get(kind, 0) + row.steps
            found[data][run] = tuple(Row(*kind, steps) for kind, steps in rows.items())
            replace(self._path, json.dumps({"version": VERSION, "data": found}, indent=1).encode())

    def _read(self) -> Mapping[str, Mapping[str, tuple[Row, ...]]]:
        if not self._path.exists():
            return {}
        try:
            told = json.loads(self._path.read_bytes())
            if told["version"] != VERSION:
                raise CheckpointError(f"{self._path} is of version {told['version']!r}, and {VERSION} is read here")
            return {
                data: {run: tuple(map(_row, rows)) for run, rows in runs.items()} for data, runs in told["data"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read ({type(error).__name__}: {error}). It says what single examples have "
                "spent: restore it from a copy. Without it nothing is trained, since too much could be"
            ) from None


def _row(told: list[float]) -> Row:
    noise_multiplier, rate, steps = told
    if not (0 < noise_multiplier < math.inf and 0 < rate <= 1 and steps >= 0 and steps == int(steps)):
        raise ValueError(f"{told} is no row")
    return Row(float(noise_multiplier), float(rate), int(steps))

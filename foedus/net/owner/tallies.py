"""Files in which an owner's side counts by data set and run; one that cannot be read is never taken for an empty one.

Not here: what is counted (``spending.py``, ``releases.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from foedus.errors import CheckpointError
from foedus.record.files import replace

__all__ = ["read_tally", "write_tally"]

VERSION = 1

T = TypeVar("T")


def read_tally(path: Path, parse: Callable[[Any], T], *, lost: str) -> dict[str, dict[str, T]]:
    """What is counted, by data set and run; nothing if there is no file.

    Args:
        path: of the file.
        parse: reads what is told of one run; raises `ValueError`, `KeyError` or `TypeError` if it is wrong.
        lost: what is lost with a file that cannot be read, in words.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_bytes())
        if told["version"] != VERSION:
            raise CheckpointError(f"{path} is of version {told['version']!r}, and {VERSION} is read here")
        return {data: {run: parse(each) for run, each in runs.items()} for data, runs in told["data"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}). {lost}") from None


def write_tally(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Write what is counted; it is on the disk when this returns."""
    replace(path, json.dumps({"version": VERSION, "data": found}, indent=1).encode())

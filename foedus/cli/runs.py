"""``foedus runs``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import Verb

if TYPE_CHECKING:
    from foedus.record import Record


@click.command("runs", cls=Verb, examples=("foedus runs", "foedus runs runs/sweep-20260101-120000"))
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """A table of run folders, the latest last.

    FOLDER is `runs` by default, and is searched with its sub-folders.
    """
    from rich.console import Console

    from foedus.record.folder import CONFIGURATION, read
    from foedus.report.tables import table

    files = sorted(folder.rglob(CONFIGURATION), key=lambda path: path.stat().st_mtime)
    if not files:
        click.echo(f"there are no run folders in {folder}; `foedus simulate` makes one")
        return
    Console().print(table([row(read(path.parent), folder) for path in files]))


def row(record: Record, folder: Path) -> dict[str, Any]:
    """What the table says about one run."""
    told, done = record.configuration, record.metrics[-1]["round"] if record.metrics else 0
    final: dict[str, Any] = next((m["central"] for m in reversed(record.metrics) if "central" in m), {})
    seconds = sum(line.get("seconds", 0.0) for line in record.timings)
    path = record.folder.relative_to(folder).as_posix()
    return {
        "run": folder.as_posix() if path == "." else path,
        "status": "finished" if told.get("status") == "finished" else "unfinished",
        "rounds": f"{done} of {told.get('rounds', '?')}",
        "clients": told.get("clients"),
        "cohort": told.get("cohort"),
        "algorithm": told.get("algorithm"),
        **{name: value for name, value in final.items() if value is not None},
        "executor": told.get("executor"),
        "time": f"{seconds:.1f} s",
    }

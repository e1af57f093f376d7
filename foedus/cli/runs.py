"""``foedus runs``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import Verb
from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from foedus.record import Record


@click.command("runs", cls=Verb, examples=("foedus runs", "foedus runs runs/sweep-20260101-120000"))
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--long", is_flag=True, help="Also the algorithm and the cohort.")
def command(folder: Path, long: bool) -> None:
    """A table of run folders, the latest last.

    FOLDER is `runs` by default, and is searched with its sub-folders.
    """
    from foedus.record.folder import CONFIGURATION, read
    from foedus.report.tables import show, table

    if not folder.is_dir() and folder != Path("runs"):
        raise ConfigurationError(f"there is no folder {folder}")
    files = sorted(folder.rglob(CONFIGURATION), key=lambda path: path.stat().st_mtime)
    if not files:
        click.echo(f"there are no run folders in {folder}; `foedus simulate` makes one")
        return
    show(table([row(read(path.parent), folder, long=long) for path in files]), whole=long)


def row(record: Record, folder: Path, *, long: bool = False) -> dict[str, Any]:
    """What the table says about one run."""
    told, done = record.configuration, record.metrics[-1]["round"] if record.metrics else 0
    seconds = sum(line.get("seconds", 0.0) for line in record.timings)
    path = record.folder.relative_to(folder).as_posix()
    return {
        "run": folder.as_posix() if path == "." else path,
        "rounds": f"{done}/{told.get('rounds', '?')}",
        **{name: value for name, value in record.final.items() if value is not None},
        "status": told.get("status") if told.get("status") == "finished" else "unfinished",
        "clients": told.get("clients"),
        "executor": told.get("executor"),
        "time": f"{seconds:.1f} s",
        **({"cohort": told.get("cohort"), "algorithm": told.get("algorithm")} if long else {}),
    }

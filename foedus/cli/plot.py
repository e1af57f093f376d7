"""``foedus plot``"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from foedus.cli.verb import Verb, recorded


@click.command(
    "plot",
    cls=Verb,
    examples=(
        "foedus plot runs/20260101-120000",
        "foedus plot runs/fedavg runs/fedprox --metric accuracy --output both.png",
    ),
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--metric", help="What to draw of several runs; by default the first metric that all have.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="A png, pdf or svg file.")
def command(runs: tuple[Path, ...], metric: str | None, output: Path | None) -> None:
    """Draw the curves of a run, or of several in one picture.

    A folder without a run of its own stands for all the runs below it.
    One run: loss, metrics and traffic, into its own figures/curves.png; if it has local curves, also
    figures/local.png. Several runs: into runs.png.
    """
    from foedus.record.folder import LOCAL
    from foedus.report.curves import plot_run, plot_runs
    from foedus.report.local import plot_local

    records = recorded(runs)
    if len(records) > 1 or metric:
        target = output or Path("runs.png")
        plot_runs(dict(zip(names([record.folder for record in records]), records, strict=True)), metric, target)
    else:
        target = output or records[0].folder / "figures" / "curves.png"
        plot_run(records[0], target)
        if output is None and (records[0].folder / LOCAL).exists():
            plot_local(records[0])
            click.echo(records[0].folder / "figures" / "local.png")
    click.echo(target)


def names(runs: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths without what all have in common.

    Example:
        >>> names([Path("runs/a/federated"), Path("runs/b/federated")])
        ['a/federated', 'b/federated']
    """
    if len(runs) == 1:
        return [runs[0].resolve().name]
    whole = [str(path.resolve()) for path in runs]
    shared = os.path.commonpath(whole)
    told = [Path(os.path.relpath(path, shared)).as_posix() for path in whole]
    return [name if told.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(told, 1)]

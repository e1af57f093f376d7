"""``foedus restore``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb
from foedus.errors import ConfigurationError


@click.command(
    "restore", cls=Verb,
    examples=(
        "foedus restore backups/monday foedus-server",
        "foedus restore backups/monday foedus-server --reached run=57",
    ),
)  # fmt: skip
@click.argument("backup", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--reached", multiple=True, metavar="RUN=ROUND",
    help="The last round that a run had begun before the server was lost, or any later one.",
)  # fmt: skip
def command(backup: Path, folder: Path, reached: tuple[str, ...]) -> None:
    """Put a BACKUP into a new FOLDER.

    `foedus serve` with that folder goes on from there. What runs released after the backup was made was released: those
    with noise, masks or encryption go on only if --reached says how far they had come, with the round after that.
    """
    from foedus.net.backup import restore

    found = restore(backup, folder, dict(map(_said, reached)))
    click.echo(f"{folder} is as it was; start the server with --folder {folder}")
    for run, gap in found.items():
        if gap.reached is None:
            click.echo(
                f"{run} was at round {gap.round}. If it has noise, masks or encryption, restore it again with the last "
                f"round that had begun, --reached {run}=ROUND; clients say which: foedus ledger"
            )
        else:
            click.echo(f"{run} was at round {gap.round}, and goes on after round {gap.reached}")


def _said(text: str) -> tuple[str, int]:
    run, _, round = text.rpartition("=")
    if not run or not round.isdecimal():
        raise ConfigurationError(f"--reached takes a run and its last round, such as --reached run=57; not {text!r}")
    return run, int(round)

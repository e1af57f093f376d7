"""``foedus restore``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb


@click.command("restore", cls=Verb, examples=("foedus restore backups/monday foedus-server",))
@click.argument("backup", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def command(backup: Path, folder: Path) -> None:
    """Put a BACKUP into a new FOLDER.

    `foedus serve` with that folder goes on from there.
    """
    from foedus.net.backup import restore

    restore(backup, folder)
    click.echo(f"{folder} is as it was; start the server with --folder {folder}")

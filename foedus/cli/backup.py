"""``foedus backup``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb


@click.command("backup", cls=Verb, examples=("foedus backup foedus-server backups/monday",))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("to", type=click.Path(path_type=Path))
def command(folder: Path, to: Path) -> None:
    """Copy a server's FOLDER to a new place, while it runs.

    The copy holds the server's identity: keep it as safe as the server.
    """
    from foedus.net.backup import backup

    models = backup(folder, to)
    click.echo(f"{to} holds the database, the identity and {models} model{'s' * (models != 1)}")

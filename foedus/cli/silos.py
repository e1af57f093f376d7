"""``foedus silos``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.owner import owner_folder
from foedus.cli.verb import Verb

_FOLDER = click.option("--folder", type=click.Path(path_type=Path), help="The owner's folder.")


@click.group("silos")
def command() -> None:
    """Agree with other owners on the key of encrypted sums.

    The server never sees the key; see "Add up encrypted updates" in the documentation.
    """


@command.command("identity", cls=Verb, examples=("foedus silos identity",))
@_FOLDER
def identity(folder: Path | None) -> None:
    """Print this owner's public identity, to be told to the other owners by telephone or on paper."""
    from foedus.net.owner.peers import own_secret
    from foedus.secure.primitives import identity_key

    click.echo(identity_key(own_secret(owner_folder(folder).path)).hex())


@command.command(
    "agree", cls=Verb, examples=('foedus silos agree /mnt/shared --name Basel --roster roster.txt --session "trial 7"',)
)
@click.argument("shared", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", required=True, help="This silo's name in the roster.")
@click.option(
    "--roster", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A line NAME IDENTITY for every silo.",
)  # fmt: skip
@click.option("--session", required=True, help="Tells this agreement from any other; the same words for all.")
@_FOLDER
def agree(shared: Path, name: str, roster: Path, session: str, folder: Path | None) -> None:
    """Do the next step, as far as the others' files are there; run it again until it says that the key is there.

    SHARED is a folder for files that anybody may pass on: a shared drive, or what came by mail. They are signed, and
    what is secret in them is sealed.
    """
    from foedus.net.owner.silos import agree as step
    from foedus.net.owner.silos import roster_of

    owner = owner_folder(folder)
    found = step(owner, shared, name=name, roster=roster_of(roster), session=session)
    if found.awaited:
        click.echo(f"waiting for {found.awaited}; run this again when they are in {shared}")
        raise click.exceptions.Exit(1)
    click.echo(f"all have the same key, {found.id.hex()}; it is at {owner.silo_key}")

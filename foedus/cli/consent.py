"""``foedus consent``"""

from __future__ import annotations

import time
from pathlib import Path

import click

from foedus.cli.verb import Verb

_FOLDER = click.option("--folder", type=click.Path(path_type=Path), help="The owner's folder.")
_WHO = click.option("--who", help="Who decides, as they call themselves; by default the name of the user.")
_TASK = click.option("--task", default="", help="For one task only: its digest.")


@click.group("consent")
def command() -> None:
    """Who agreed that this machine's data trains models, to what, and when."""


@command.command("show", cls=Verb, examples=("foedus consent show",))
@_FOLDER
def show(folder: Path | None) -> None:
    """All records, the latest last, in the words that were agreed to."""
    from foedus.cli.owner import folder_in_use

    records = folder_in_use(folder).consents().records()
    for record in records:
        what = "given" if record.given else "withdrawn"
        click.echo(f"{record.when}  {what} by {record.who}, {record.server}, {record.task or 'every task'}")
        click.echo("".join(f"    {line}\n" for line in record.words.splitlines()))
    if not records:
        click.echo("no consent is recorded; nothing is trained without")


@command.command("give", cls=Verb, examples=('foedus consent give https://fl.example.org:8765 --who "Dr Weiss"',))
@click.argument("server", metavar="URL")
@_WHO
@_TASK
@click.option("--data", default="the data offered", help="What the data set is called.")
@_FOLDER
def give(server: str, who: str | None, task: str, data: str, folder: Path | None) -> None:
    """Record consent for a server, URL; it shows the words."""
    from foedus.cli.owner import owner_folder, whoever
    from foedus.net.owner.consent import plain

    by = whoever() if who is None else who
    record = owner_folder(folder).consents().give(plain(server), who=by, when=time.time(), task=task, data=data)
    click.echo(record.words)
    click.echo(f"recorded: {record.who}, {record.when}")


@command.command("withdraw", cls=Verb, examples=("foedus consent withdraw https://fl.example.org:8765",))
@click.argument("server", metavar="URL")
@_WHO
@_TASK
@_FOLDER
def withdraw(server: str, who: str | None, task: str, folder: Path | None) -> None:
    """Withdraw consent for a server, URL; it says what that undoes and what it cannot.

    What waits to be sent is deleted at once, whether or not an agent is running.
    """
    from foedus.cli.owner import folder_in_use, whoever
    from foedus.net.owner.consent import plain
    from foedus.net.owner.withdrawal import forget

    by, owner = whoever() if who is None else who, folder_in_use(folder)
    record = owner.consents().withdraw(plain(server), who=by, when=time.time(), task=task)
    deleted = forget(owner, plain(server), task)
    click.echo(record.words.rstrip())
    click.echo(f"recorded: {record.who}, {record.when}; {deleted} updates that were waiting are deleted")

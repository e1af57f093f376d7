"""``foedus ledger``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb


@click.group("ledger")
def command() -> None:
    """What left this machine: everything, each written down before it left."""


@command.command("show", cls=Verb, examples=("foedus ledger show", "foedus ledger show --last 5"))
@click.option("--folder", type=click.Path(path_type=Path), help="The owner's folder.")
@click.option("--last", type=click.IntRange(1), help="Only the last so many.")
def show(folder: Path | None, last: int | None) -> None:
    """A table of what left: when, to whom, for which task, how many bytes, under which protections."""
    from foedus.cli.owner import folder_in_use

    ledger = folder_in_use(folder).ledger()
    entries = list(ledger.entries())
    for entry in entries[-last:] if last else entries:
        d = entry.departure
        which = f"{d.run} round {d.round}" + (f", attempt {d.attempt}" if d.attempt > 1 else "") if d.run else "-"
        click.echo(f"{entry.number:>5}  {entry.when}  {d.bytes:>12,} bytes  {d.what}  to {d.to}")
        click.echo(f"       {which}; task {d.task or '-'}; sha256 {d.digest[:16]}")
        click.echo(f"       protections: {'; '.join(d.protections) or 'none'}")
    click.echo(f"{len(entries)} in all, {ledger.bytes:,} bytes")
    click.echo(f"head: {ledger.head}")


@command.command("verify", cls=Verb, examples=("foedus ledger verify", "foedus ledger verify --head 9f86d08..."))
@click.option("--folder", type=click.Path(path_type=Path), help="The owner's folder.")
@click.option("--head", help="A head that `foedus ledger show` told earlier, and that was noted down elsewhere.")
def verify(folder: Path | None, head: str | None) -> None:
    """Check that no line was changed, moved, taken out or cut off."""
    from foedus.cli.owner import folder_in_use

    ledger = folder_in_use(folder).ledger()
    found = ledger.verify(head)
    click.echo(f"whole: {ledger.count} lines, each follows the one before it")
    click.echo(f"head: {found}")
    if head is None:
        click.echo("note the head down elsewhere: only then a ledger that was written anew as a whole is found, too")

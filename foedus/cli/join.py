"""``foedus join``"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import Verb

if TYPE_CHECKING:
    from foedus.net.join import Joining


@click.command(
    "join",
    cls=Verb,
    examples=(
        "foedus join https://fl.example.org:8765 --pin 3f1c... --token ... --data my_data.py:examples",
        "foedus join https://fl.example.org:8765 --data my_data.py:examples --check",
    ),
)
@click.argument("url", metavar="URL")
@click.option(
    "--data", required=True, metavar="MODULE:OBJECT", help="Examples, (x, y), Clients, or a function of none."
)
@click.option("--pin", help="The server's fingerprint, from its join command.")
@click.option("--token", help="From the join command; needed once.")
@click.option("--part", default="", help="Of Clients: which of them this is.")
@click.option("--name", default="", help="What to be called there.")
@click.option("--run", default="", help="Take part in this run only.")
@click.option("--dataset", default="", help="The name by which rules.toml offers the data.")
@click.option("--approve", multiple=True, metavar="DIGEST", help="A task that may run; may be given several times.")
@click.option(
    "--silo-key", type=click.Path(path_type=Path, exists=True), help="The silos' key, if not in the owner's folder."
)
@click.option("--consent", default="", metavar="NAME", help="Who agrees: records consent, if there is none.")
@click.option("--folder", type=click.Path(path_type=Path), help="The owner's folder.")
@click.option("--check", is_flag=True, help="Only show what would be allowed, and why not.")
@click.option("--once", is_flag=True, help="Stop when there is something to wait for.")
@click.option("--stay", is_flag=True, help="Look for further runs when one is over.")
@click.option("--no-evaluate", is_flag=True, help="Do not evaluate models on what is held out.")
@click.option("--memory", type=click.IntRange(1), help="Megabytes that training may take.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="That training may take in a round.")
@click.option("--cores", type=click.IntRange(0), help="Of the processor that training may take; 0 for all.")
@click.option("--authorities", type=click.Path(path_type=Path, exists=True), help="More certificate authorities (PEM).")
@click.option("--system-authorities", is_flag=True, help="Trust those of the operating system, too.")
@click.option("--insecure-loopback", is_flag=True, help="Plain HTTP to this very machine, to try things out.")
def command(url: str, data: str, check: bool, **given: Any) -> None:
    """Take part in a served federation with your own data.

    URL, --pin and --token come from whoever runs the server. What is allowed is in rules.toml in the owner's folder; it
    is written there with comments when there is none. Stop it with Ctrl-C; the same command goes on.
    """
    from foedus.net.join import join

    settings = _settings(given)
    if check:
        _show(url, data, settings)
        return
    joined = join(url, data=data, settings=_asked(url, settings))
    click.echo(f"sessions: {' '.join(joined.sessions[-10:]) or 'none'}")
    if joined.models.exists():
        click.echo(f"models: {joined.models}")


def _settings(given: dict[str, Any]) -> Joining:
    """Every flag is one field."""
    from foedus.net.join import Joining
    from foedus.net.sandbox import Limits

    names = {"memory": "memory_mb", "seconds": "seconds", "cores": "cores"}
    limits = {name: given.pop(flag) for flag, name in names.items()}
    given["evaluate"] = not given.pop("no_evaluate")
    known = {name: value for name, value in limits.items() if value is not None}
    return Joining(limits=Limits(**known), tell=click.echo, **given)


def _asked(url: str, settings: Joining) -> Joining:
    """Where somebody sits at a terminal, show what is agreed to, and ask; it is written when the server is known to be
    the one."""
    from dataclasses import replace

    from foedus.cli.owner import whoever
    from foedus.net.identity.tls import permitted
    from foedus.net.owner.consent import plain, words

    consents = settings.owner.consents()
    if settings.consent or any(c.server == plain(url) for c in consents.records()) or not sys.stdin.isatty():
        return settings
    click.echo(words(permitted(plain(url), settings.outward)))
    who = click.prompt("Your name, to agree (Ctrl-C not to)", default=whoever())
    return replace(settings, consent=who)


def _show(url: str, data: str, settings: Joining) -> None:
    """What would be allowed now."""
    from foedus.net.join import check

    found, walls = asyncio.run(check(url, data=data, settings=settings))
    for finding in found:
        sign = click.style("yes", fg="green") if finding.passes else click.style("NO ", fg="red", bold=True)
        click.echo(f"{sign}  {finding.rule:<28} {finding.told}")
    click.echo(f"     network while training       {walls.network}")
    click.echo(f"     limits of training           {', '.join(walls.limits)}")
    refused = [finding for finding in found if not finding.passes]
    click.echo(f"{len(refused)} of {len(found)} rules say no" if refused else "allowed")
    if refused:
        raise click.exceptions.Exit(1)

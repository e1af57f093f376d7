"""``foedus status``"""

from __future__ import annotations

import json
from pathlib import Path

import click

from foedus.cli.verb import Verb
from foedus.errors import ConfigurationError

# What is to be done where clients decline, by the reason that they gave (``protocol/messages.py``).
DECLINED = {
    "rules": "their owners' rules say no, as each agent's own output tells; often they want an update summed with more "
    "others: foedus serve --minimum 3, or more",
    "approval": "their owners have yet to approve the task: foedus tasks review and approve there, or foedus join "
    "--approve DIGEST with the digest that foedus serve printed",
    "data": "they have no example to train on",
    "training": "training failed there; the agent's own output tells how",
    "spent": "what their single examples may cost is spent: they train no more in this run",
    "secure-aggregation": "something of a masked or encrypted sum was not as it must be; the agent's own output tells "
    "what",
    "signature": "orders or source are not what this server signed; does a proxy change them, or is its identity new?",
    "interrupted": "they were started again in the middle, and take part in the next attempt",
    "too large": "their updates are larger than what this server takes: Serving(uploads=...)",
    "other": "for a reason that this version does not know; the agent's own output tells it",
}


@click.command("status", cls=Verb, examples=("foedus status", "foedus status /srv/foedus", "foedus status --log"))
@click.argument("folder", default="foedus-server", type=click.Path(path_type=Path))
@click.option("--database", help="postgresql://..., where it is not in the folder.")
@click.option("--log", is_flag=True, help="The audit log instead, checked line by line.")
@click.option("--json", "plain", is_flag=True, help="A list of JSON objects, one for each run.")
def command(folder: Path, database: str | None, log: bool, plain: bool) -> None:
    """How the runs of a server stand, whether it is running or not; and its pin.

    FOLDER is the server's own, `foedus-server` by default.
    """
    from foedus.net import troubles
    from foedus.net.status import audit, enrolled, runs
    from foedus.report.tables import show, table

    if database is None and not (folder / "foedus.sqlite").exists():
        raise ConfigurationError(f"{folder} is no server's folder: it has no foedus.sqlite")
    url = database or f"sqlite:///{folder / 'foedus.sqlite'}"
    if log:
        for line in audit(url):
            click.echo(line)
        return
    found = runs(url)
    if plain:
        click.echo(json.dumps(found, indent=1))
        return
    authority = folder / "identity" / "authority.pem"
    if authority.exists():
        click.echo(f"pin: {_pin(authority)}")
    for each in troubles.shown(folder):
        when = f"since {_moment(each.since)}, {each.times} times until {_moment(each.last)}"
        click.echo(f"{each.what} {when}: {each.why}")
    if not found:
        click.echo(f"no round has begun yet; clients that have enrolled: {enrolled(url)}")
        return
    show(table([run | {"declined": sum(run["declined"].values())} for run in found]))
    for run in found:
        for reason, count in run["declined"].items():
            click.echo(f"{run['run']}: {count} declined ({reason}): {DECLINED[reason]}")


def _moment(seconds: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _pin(authority: Path) -> str:
    """The fingerprint that clients pin."""
    import ssl

    from foedus.net.identity.authority import fingerprint

    return fingerprint(ssl.PEM_cert_to_DER_cert(authority.read_text("ascii")))

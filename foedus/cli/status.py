"""``foedus status``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb
from foedus.errors import ConfigurationError


@click.command("status", cls=Verb, examples=("foedus status", "foedus status /srv/foedus", "foedus status --log"))
@click.argument("folder", default="foedus-server", type=click.Path(path_type=Path))
@click.option("--database", help="postgresql://..., where it is not in the folder.")
@click.option("--log", is_flag=True, help="The audit log instead, checked line by line.")
def command(folder: Path, database: str | None, log: bool) -> None:
    """How the runs of a server stand, whether it is running or not; and its pin.

    FOLDER is the server's own, `foedus-server` by default.
    """
    from foedus.net.status import audit, runs
    from foedus.report.tables import show, table

    if database is None and not (folder / "foedus.sqlite").exists():
        raise ConfigurationError(f"{folder} is no server's folder: it has no foedus.sqlite")
    url = database or f"sqlite:///{folder / 'foedus.sqlite'}"
    if log:
        for line in audit(url):
            click.echo(line)
        return
    authority = folder / "identity" / "authority.pem"
    if authority.exists():
        click.echo(f"pin: {_pin(authority)}")
    found = runs(url)
    if not found:
        click.echo("no round has begun yet")
        return
    show(table(found))
    if any(run["declined"] for run in found):
        click.echo(
            "clients declined: their owners' rules say no, or training failed there. Why is in the server's log "
            "(declined); often the rules want an update summed with more others: foedus serve --minimum 3, or more"
        )


def _pin(authority: Path) -> str:
    """The fingerprint that clients pin."""
    import ssl

    from foedus.net.identity.authority import fingerprint

    return fingerprint(ssl.PEM_cert_to_DER_cert(authority.read_text("ascii")))

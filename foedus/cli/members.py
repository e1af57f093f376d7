"""``foedus members``"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foedus.cli.verb import Verb

if TYPE_CHECKING:
    from foedus.net.identity.access import Access

_FOLDER = click.option("--folder", type=click.Path(path_type=Path), default="foedus-server", help="The server's own.")
_DATABASE = click.option("--database", help="postgresql://..., if the server has one; by default its SQLite.")


@click.group("members")
def command() -> None:
    """Who may take part in what a server serves: invite, list, revoke.

    Run it where the server's folder is.
    """


@command.command("invite", cls=Verb, examples=("foedus members invite --url https://fl.hospital.example:8765",))
@click.option("--url", help="The server's address, as the client reaches it; by default where it listened last.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=24.0, help="How long the token is good.")
@click.option("--uses", type=click.IntRange(1), default=1, help="How many clients it lets in.")
@click.option("--name", default="", help="The only name that it is good for.")
@click.option("--population", default="", help="Whose runs they take part in (serve --population); by default of none.")
@click.option("--device", is_flag=True, help="A device: no client certificate is issued or asked for.")
@_FOLDER
@_DATABASE
def invite(
    url: str | None, hours: float, uses: int, name: str, population: str, device: bool, folder: Path,
    database: str | None,
) -> None:  # fmt: skip
    """Make a join token and print the command that uses it. It is shown once; the server keeps a digest."""
    from foedus.net.identity.tls import Outward, permitted

    if url is not None:
        url = permitted(url, Outward(insecure_loopback=True))
    with _access(folder, database) as access:
        url = url or _served_at(folder, database)
        token = access.invite(
            now=time.time(), hours=hours, uses=uses, silo=not device, name=name, population=population
        )
        named = f" --name {name}" if name else ""
        named += " --insecure-loopback" if url.startswith("http:") else ""
        click.echo(f"foedus join {url} --pin {access.authority.pin} --token {token}{named} --data MODULE:OBJECT")


@command.command("show", cls=Verb, examples=("foedus members show --folder /srv/foedus",))
@_FOLDER
@_DATABASE
def show(folder: Path, database: str | None) -> None:
    """All members, in the order in which they joined."""
    with _access(folder, database) as access:
        members = access.directory.members()
    for member in members:
        kind = ("silo" if member.silo else "device") + (f" of {member.population}" if member.population else "")
        since = datetime.fromtimestamp(member.enrolled_at, UTC).strftime("%Y-%m-%d")
        gone = "" if member.revoked_at is None else ", revoked"
        click.echo(f"{member.position:>5}  {member.name}  ({kind}, since {since}{gone})")
    if not members:
        click.echo("nobody has joined yet; foedus members invite makes a token")


@command.command("revoke", cls=Verb, examples=("foedus members revoke clinic-north",))
@click.argument("name")
@_FOLDER
@_DATABASE
def revoke(name: str, folder: Path, database: str | None) -> None:
    """Let the member NAME in no more; a server that runs knows within seconds. Its name and key never come back."""
    with _access(folder, database) as access:
        access.directory.revoke(name, now=time.time())
    click.echo(f"{name} is revoked; models that were trained with its updates stay as they are")


def _served_at(folder: Path, database: str | None) -> str:
    """Where the server listened last, as it said itself; the usual address, if it never did."""
    from foedus.net.serve import DATABASE
    from foedus.net.store import LEADER, open_store

    store = open_store(database or f"sqlite:///{folder / DATABASE}")
    try:
        with store.begin() as rows:
            lease = rows.lease(LEADER)
    finally:
        store.close()
    return lease.address if lease is not None and not lease.address.endswith(":0") else "https://localhost:8765"


@contextmanager
def _access(folder: Path, database: str | None) -> Iterator[Access]:
    """The door of a server's folder, which may be running or not."""
    from foedus.errors import ConfigurationError
    from foedus.net.identity.access import Access
    from foedus.net.identity.authority import Authority
    from foedus.net.serve import DATABASE, IDENTITY
    from foedus.net.store import open_store

    if not (folder / IDENTITY / "authority.pem").exists():
        raise ConfigurationError(f"{folder} is not the folder of a server; write --folder FOLDER, as for foedus serve")
    store = open_store(database or f"sqlite:///{folder / DATABASE}")
    try:
        yield Access(Authority.kept(folder / IDENTITY, now=time.time()), store)
    finally:
        store.close()

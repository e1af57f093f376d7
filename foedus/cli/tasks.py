"""``foedus tasks``"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foedus.cli.verb import Verb

if TYPE_CHECKING:
    from foedus.net.owner.approvals import Approvals

_FOLDER = click.option("--folder", type=click.Path(path_type=Path), help="The owner's folder.")
_WHO = click.option("--who", help="Who decides, as they call themselves; by default the name of the user.")


@click.group("tasks")
def command() -> None:
    """Tasks that servers sent: look at their source, approve or deny them. None runs that is not approved."""


@command.command("list", cls=Verb, examples=("foedus tasks list",))
@_FOLDER
def list_(folder: Path | None) -> None:
    """All tasks that came, and what was decided."""
    tasks = _approvals(folder).tasks()
    for task in tasks:
        by = f" by {task.who}, {task.decided[:10]}" if task.decided else ""
        if task.listed and not task.decided:
            by = f", and ran by its digest (--approve, or rules.toml) since {task.listed[:10]}"
        click.echo(
            f"{task.digest[:16]}  {task.decision.value}{by}  {task.target}  from {task.server}, {task.came[:10]}"
        )
    if not tasks:
        click.echo("no task has come yet")


@command.command("review", cls=Verb, examples=("foedus tasks review 9f86d081884c7d65",))
@click.argument("digest")
@click.option("--whole", is_flag=True, help="All of the source, not only what differs from the one approved before.")
@_FOLDER
def review(digest: str, whole: bool, folder: Path | None) -> None:
    """Show the source of a task, or what differs from the one approved before; nothing of it is run.

    DIGEST may be the beginning of it.
    """
    from foedus.net.bundle import differences

    approvals = _approvals(folder)
    task, before = approvals.find(digest), approvals.before(approvals.find(digest))
    shown = differences(None, approvals.bundle(task)) if whole else approvals.review(task)
    click.echo(shown or "the source is the same")
    click.echo("")
    click.echo(f"task {task.digest}")
    click.echo(f"{task.target} from {task.server}, came {task.came[:10]}: {task.decision.value}")
    if before is not None and not whole:
        click.echo(f"compared with {before.digest[:16]}, approved {before.decided[:10]} by {before.who}")
    click.echo(f"to decide: foedus tasks approve {task.digest[:16]}, or foedus tasks deny {task.digest[:16]}")


@command.command("approve", cls=Verb, examples=("foedus tasks approve 9f86d081884c7d65",))
@click.argument("digest")
@_WHO
@_FOLDER
def approve(digest: str, who: str | None, folder: Path | None) -> None:
    """Let a task run here; look at it first. DIGEST may be the beginning of it."""
    _decide(digest, "approved", who, folder)


@command.command("deny", cls=Verb, examples=("foedus tasks deny 9f86d081884c7d65",))
@click.argument("digest")
@_WHO
@_FOLDER
def deny(digest: str, who: str | None, folder: Path | None) -> None:
    """Do not let a task run here, from now on. DIGEST may be the beginning of it."""
    _decide(digest, "denied", who, folder)


def _approvals(folder: Path | None) -> Approvals:
    from foedus.cli.owner import folder_in_use
    from foedus.net.owner.approvals import Approvals

    return Approvals(folder_in_use(folder).path)


def _decide(digest: str, decision: str, who: str | None, folder: Path | None) -> None:
    from foedus.cli.owner import whoever
    from foedus.net.owner.approvals import Decision

    by = whoever() if who is None else who
    task = _approvals(folder).decide(digest, Decision(decision), who=by, when=time.time())
    click.echo(f"{task.decision.value}: {task.digest[:16]}, {task.target} from {task.server}")

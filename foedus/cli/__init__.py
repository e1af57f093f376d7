"""The command line: one verb per file, each a thin layer over the public names.

    foedus demo                        federated learning in a minute, offline
    foedus new NAME                    a small project to start from
    foedus simulate module:object      run a federation
    foedus serve module:object         the same between machines
    foedus status / backup / restore   of a server
    foedus members                     who may take part: invite, list, revoke
    foedus compare module:object       federated, centralised and local-only, side by side
    foedus runs / plot / export        look at runs
    foedus privacy                     how private a plan is, and how much noise it takes
    foedus join URL                    take part in a served federation with your own data
    foedus tasks                       tasks that servers sent: review, approve, deny
    foedus ledger / consent            what left this machine, and who agreed to it
    foedus silos                       agree with other owners on the key of encrypted sums
    foedus audit module:object         attack a run of one's own, and say what could be learnt
    foedus doctor                      what is installed, and what works

A federation is a Python value (:class:`foedus.Federation`); every flag replaces one field of it. Errors of ours
are one message without a traceback: exit code 2 where the configuration is to be changed, 1 otherwise.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence

import click

from foedus.cli import (
    audit,
    backup,
    compare,
    consent,
    demo,
    doctor,
    export,
    join,
    ledger,
    members,
    new,
    plot,
    privacy,
    restore,
    runs,
    serve,
    silos,
    simulate,
    status,
    tasks,
)
from foedus.cli.verb import State
from foedus.errors import ConfigurationError, FoedusError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="foedus")
def foedus() -> None:
    """Federated learning: many parties train one model together; every party's data stays where it is.

    Begin with `foedus demo`, or with `foedus new my_project`.
    """


for _verb in (
    audit, backup, compare, consent, demo, doctor, export, join, ledger, members, new, plot, privacy, restore, runs,
    serve, silos, simulate, status, tasks,
):  # fmt: skip
    foedus.add_command(_verb.command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; ends the process with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit code; faults of the user's own code pass through."""
    state = State()
    try:
        code = foedus.main(
            None if arguments is None else list(arguments),
            prog_name="foedus",
            obj=state,
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except FoedusError as error:
        if state.debug:
            traceback.print_exc()
        else:
            click.echo(f"{click.style('foedus:', fg='red', bold=True)} {in_flags(str(error))}", err=True)
        return 2 if isinstance(error, ConfigurationError) else 1


def in_flags(message: str) -> str:
    """A message that says what to write in Python, for somebody who writes flags.

    Example:
        >>> in_flags("it does not fit; write cohort=10, or less")
        'it does not fit; write --cohort 10, or less'
    """
    message = message.replace("let it go on: Settings(resume=True)", "let it go on: leave out --no-resume")
    return re.sub(r"\b(rounds|cohort)=(\d+)", r"--\1 \2", message)

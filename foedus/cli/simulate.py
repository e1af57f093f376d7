"""``foedus simulate``"""

from __future__ import annotations

from typing import Any

import click

from foedus.cli.verb import Flags, Verb, load, with_target


@click.command(
    "simulate",
    cls=Verb,
    examples=(
        "foedus simulate my_project/federation.py",
        "foedus simulate federation.py:skewed --rounds 50 --cohort 10",
        "foedus simulate my_package.module:federation --folder runs/first --executor debug",
    ),
)
@with_target
@click.option("--stop-at", metavar="METRIC=VALUE", multiple=True, help="Stop when reached, e.g. accuracy=0.97.")
def command(target: str, stop_at: tuple[str, ...], **flags: Any) -> None:
    """Run a federation on this machine.

    MODULE:OBJECT names a foedus.Federation, in a module or in a file; without an object it is `federation`. An
    interrupted run goes on when it is called again with the same --folder.
    """
    from dataclasses import replace

    from foedus.sim.federation import run_federation

    federation = Flags(**flags).over(load(target))
    if stop_at:
        stop = dict(_goal(each) for each in stop_at)
        federation = replace(federation, evaluation=replace(federation.evaluation, stop_at=stop))
    run = run_federation(federation)
    told = ", ".join(f"{name} {value:.4g}" for name, value in run.final.items() if value is not None)
    click.echo(f"after round {len(run.metrics)}: {told or 'not evaluated'}")
    click.echo(f"run folder: {run.folder}   (foedus plot {run.folder})")


def _goal(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise click.BadParameter(f"--stop-at takes METRIC=VALUE, such as accuracy=0.97; not {text!r}") from None

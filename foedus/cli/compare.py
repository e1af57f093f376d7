"""``foedus compare``"""

from __future__ import annotations

from typing import Any

import click

from foedus.cli.verb import Flags, Verb, load, with_target


@click.command(
    "compare",
    cls=Verb,
    examples=(
        "foedus compare federation.py",
        "foedus compare federation.py --rounds 20 --alone 4 --folder runs/does_it_work",
    ),
)
@with_target
@click.option("--alone", type=click.IntRange(1), default=8, show_default=True, help="Clients trained alone.")
def command(target: str, alone: int, **flags: Any) -> None:
    """Does it work? Beside centralised and local-only training.

    Federated, centralised and local-only training on the same data, evaluated on the same test set; prints a
    table and draws a figure. An interrupted comparison goes on when it is called again with the same --folder.
    """
    from foedus.errors import MissingExtra
    from foedus.report.tables import show
    from foedus.sim.compare import Arms, compare

    federation = Flags(**flags).over(load(target))
    found = compare(
        federation.task, federation.algorithm, federation.population(), rounds=federation.rounds,
        cohort=federation.cohort, seed=federation.seed, settings=federation.settings,
        arms=Arms(alone=alone, every=federation.evaluation.every or 1),
    )  # fmt: skip
    show(found.table())
    try:
        found.plot()
        click.echo(f"figure: {found.folder / 'figures' / 'comparison.png'}")
    except MissingExtra as error:
        click.echo(f"no figure: {error}")
    click.echo(f"everything is in {found.folder}")

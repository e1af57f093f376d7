"""``foedus audit``"""

from __future__ import annotations

from typing import Any

import click

from foedus.cli.verb import Flags, Verb, load, with_target


@click.command(
    "audit",
    cls=Verb,
    examples=(
        "foedus audit federation.py",
        "foedus audit federation.py --folder runs/first",
        "foedus audit my_package.module:federation --canaries 100 --batches 1 --batches 8",
        "foedus audit federation.py --rounds 10 --canaries 0",
    ),
)
@with_target
@click.option("--canaries", type=click.IntRange(0), default=32, show_default=True, help="Clients that measure ε.")
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=1e-5, show_default=True,
              help="δ of every ε.")  # fmt: skip
@click.option("--examples", type=click.IntRange(1), default=500, show_default=True, help="Tested for membership.")
@click.option("--batches", type=click.IntRange(1), multiple=True, default=(1, 4), show_default=True,
              help="Sizes of batches to rebuild.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="Of each rebuilding.")
def command(
    target: str, canaries: int, delta: float, examples: int, batches: tuple[int, ...], steps: int, **flags: Any
) -> None:
    """Attack a run of your own: what could be learnt from it?

    Attacks the run in --folder (which is made, or finished, if it is not there yet): tells who was trained on, rebuilds
    examples from an update, and measures ε with canaries, for which the run is made once more unless they entered
    beforehand. Then says what an adversary at each place could learn, and what to switch on. Called again with the same
    --folder, finished parts are not done again.
    """
    from foedus.audit.examine import audit
    from foedus.audit.parts import Effort

    federation = Flags(**flags).over(load(target))
    effort = Effort(
        canaries=canaries, delta=delta, examples=examples, sizes=batches, steps=steps,
        progress=federation.settings.progress,
    )  # fmt: skip
    found = audit(federation, effort=effort)
    click.echo(found.text)
    click.echo(f"report: {found.folder / 'report.html'}   ({found.folder / 'report.md'})")

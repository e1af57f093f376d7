"""``foedus privacy``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import Verb
from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from foedus.privacy import Plan


@click.command(
    "privacy",
    cls=Verb,
    examples=(
        "foedus privacy --noise-multiplier 1 --rounds 1500 --cohort 100 --population 3400 --hidden --delta 3e-4",
        "foedus privacy --epsilon 4 --rounds 200 --cohort 50 --population 5000 --hidden --delta 1e-5",
        "foedus privacy --epsilon 8 --rounds 50 --cohort 10 --delta 1e-4",
    ),
)
@click.option("--rounds", type=click.IntRange(1), required=True, help="Rounds in all.")
@click.option("--cohort", type=float, required=True, help="Planned clients per round.")
@click.option("--delta", type=float, required=True, help="δ; well below 1 / population.")
@click.option("--noise-multiplier", type=float, help="z = σ / clip: how private is that?")
@click.option("--epsilon", type=float, help="ε of the whole run: how much noise does that take?")
@click.option("--population", type=click.IntRange(1), help="How many clients there are.")
@click.option("--hidden", is_flag=True, help="Cohorts are Poisson-sampled, and nobody sees who takes part.")
@click.option("--points", type=click.IntRange(1), default=10, show_default=True, help="Rows of the table.")
def command(
    rounds: int, cohort: float, delta: float, noise_multiplier: float | None, epsilon: float | None, points: int,
    **clients: Any,
) -> None:  # fmt: skip
    """How private is a plan, and how much noise does it take?

    Prints ε over the rounds of a run with central noise, for --noise-multiplier, or for the least noise that keeps
    --epsilon; by both accountants. Sampling counts only with --hidden.
    """
    from foedus.privacy import Plan, calibrate
    from foedus.report.tables import show

    if (noise_multiplier is None) == (epsilon is None):
        raise ConfigurationError("give either --noise-multiplier, or the --epsilon that it is to be found for")
    if epsilon is not None:
        noise_multiplier = calibrate(epsilon, delta, rounds=rounds, cohort=cohort, **clients)
    assert noise_multiplier is not None
    plan = Plan(noise_multiplier=noise_multiplier, rounds=rounds, cohort=cohort, **clients)
    click.echo(told(plan, delta))
    show(drawn(plan, delta, points))


def told(plan: Plan, delta: float) -> str:
    """What the plan promises, and how."""
    sampling = (
        f"cohorts drawn by poisson({plan.cohort / plan.population:.4g}) that nobody sees"
        if plan.hidden and plan.population
        else "sampling does not count: every client as if in every round"
    )
    return (
        f"noise multiplier {plan.noise_multiplier:.4f}, δ = {delta:g}, {sampling}\n"
        f"for a planned cohort of {plan.cohort:g} the mean gets noise of {plan.noise_multiplier / plan.cohort:.3g} · "
        f"clip in every entry\n(ε, δ): {plan.event.neighbours}\n"
    )


def drawn(plan: Plan, delta: float, points: int) -> Any:
    """ε over the rounds, as a table."""
    from foedus.privacy import curve, pld, rdp
    from foedus.report.tables import table

    loose, tight = (curve(plan, delta, by=by, points=points) for by in (rdp, pld))
    rows = [
        {"round": a.round, "ε (rdp, a filter)": a.epsilon, "ε (pld, if all is planned)": b.epsilon}
        for a, b in zip(loose, tight, strict=True)
    ]
    return table(rows)

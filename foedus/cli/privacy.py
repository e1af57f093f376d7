"""``foedus privacy``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import Verb, load
from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from foedus.privacy import Plan, Point
    from foedus.sim.federation import Federation


@click.command(
    "privacy",
    cls=Verb,
    examples=(
        "foedus privacy --noise-multiplier 1 --rounds 1500 --cohort 100 --population 3400 --hidden --delta 2e-4",
        "foedus privacy --epsilon 4 --rounds 200 --cohort 50 --population 5000 --hidden --delta 1e-5",
        "foedus privacy --epsilon 8 --rounds 50 --cohort 10 --delta 1e-4 --plot epsilon.png",
        "foedus privacy --epsilon 8 --rounds 50 --cohort 10 --delta 1e-3 --simulate federation.py --clip 0.5",
    ),
)
@click.option("--rounds", type=click.IntRange(1), required=True, help="Rounds in all.")
@click.option("--cohort", type=float, required=True, help="Planned clients per round.")
@click.option("--delta", type=float, required=True, help="δ; well below 1 / population, and never above.")
@click.option("--noise-multiplier", type=float, help="z = σ / clip: how private is that?")
@click.option("--epsilon", type=float, help="ε of the whole run: how much noise does that take?")
@click.option("--population", type=click.IntRange(1), help="How many clients there are.")
@click.option("--hidden", is_flag=True, help="Cohorts are Poisson-sampled, and nobody sees who takes part.")
@click.option("--points", type=click.IntRange(1), default=10, show_default=True, help="Rows of the table.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the curve into this file, e.g. epsilon.png.")
@click.option("--simulate", metavar="MODULE:OBJECT", help="What it costs in accuracy: train with and without noise.")
@click.option("--clip", type=float, help="The bound of one client's update, for --simulate.")
def command(
    rounds: int, cohort: float, delta: float, noise_multiplier: float | None, epsilon: float | None, points: int,
    **more: Any,
) -> None:  # fmt: skip
    """How private is a plan, and what does it cost?

    Prints ε over the rounds of a run with central noise, for --noise-multiplier, or for the least noise that keeps
    --epsilon; by both accountants, as a table and with --plot as a figure. With --simulate it trains a federation on
    this machine, clipped with and without that noise. Sampling counts only with --hidden.
    """
    from foedus.privacy import Plan, calibrate
    from foedus.privacy.claims import check_failing
    from foedus.report.tables import show

    clients = {name: more[name] for name in ("population", "hidden")}
    if (more["simulate"] is None) != (more["clip"] is None):
        raise ConfigurationError("--simulate and --clip go together: --simulate federation.py --clip 0.5")

    if (noise_multiplier is None) == (epsilon is None):
        raise ConfigurationError("give either --noise-multiplier, or the --epsilon that it is to be found for")
    if epsilon is not None:
        noise_multiplier = calibrate(epsilon, delta, rounds=rounds, cohort=cohort, **clients)
    assert noise_multiplier is not None
    plan = Plan(noise_multiplier=noise_multiplier, rounds=rounds, cohort=cohort, **clients)
    check_failing(delta, plan.cohort, plan.population)
    federation = None if more["simulate"] is None else fitting(plan, load(more["simulate"]))
    click.echo(told(plan, delta))
    curves = costs(plan, delta, points)
    show(drawn(curves))
    if more["plot"] is not None:
        from foedus.report.spending import plot_epsilon

        plot_epsilon(curves, more["plot"], delta=delta)
        click.echo(f"figure: {more['plot']}")
    if federation is not None:
        show(tried(plan, federation, more["clip"]))


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


def costs(plan: Plan, delta: float, points: int) -> dict[str, list[Point]]:
    """ε over the rounds, by accountant."""
    from foedus.privacy import curve, pld, rdp

    names = {"ε (rdp, a filter)": rdp, "ε (pld, if all is planned)": pld}
    return {name: curve(plan, delta, by=by, points=points) for name, by in names.items()}


def drawn(curves: dict[str, list[Point]]) -> Any:
    """ε over the rounds, as a table."""
    from foedus.report.tables import table

    rounds = [point.round for point in next(iter(curves.values()))]
    return table([{"round": n, **{name: curves[name][i].epsilon for name in curves}} for i, n in enumerate(rounds)])


def fitting(plan: Plan, federation: Federation) -> Federation:
    """The federation with its clients made, if a cohort as planned can be drawn from them."""
    from dataclasses import replace

    clients = federation.population()
    if plan.population not in (None, len(clients)):
        raise ConfigurationError(
            f"the plan is for {plan.population} clients, and the federation has {len(clients)}: what noise costs the "
            f"one is not what it costs the other. Write --population {len(clients)}, or give a federation of "
            f"{plan.population}"
        )
    if plan.cohort > len(clients):
        raise ConfigurationError(
            f"the plan has {plan.cohort:g} clients in a round, and the federation has {len(clients)}. Write --cohort "
            f"{len(clients)}, or less, or give a federation of more"
        )
    return replace(federation, clients=clients)


def tried(plan: Plan, federation: Federation, clip: float) -> Any:
    """A federation's last figures with the plan's noise, and clipped without it, as a table: two runs in folders that
    are thrown away."""
    import tempfile
    from dataclasses import replace

    import foedus as fd
    from foedus.report.tables import table
    from foedus.sim.federation import run_federation

    population = federation.population()
    noisy = fd.privacy.central(clip=clip, noise_multiplier=plan.noise_multiplier, cohort=plan.cohort)
    rules = {"clipped, no noise": fd.chain(fd.clip(clip), fd.mean(weighted=False)), "with noise": noisy}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, rule) in enumerate(rules.items()):
            settings = replace(federation.settings, folder=f"{folder}/{i}", progress=False)
            made = replace(
                federation, algorithm=replace(federation.algorithm, aggregator=rule), clients=population,
                rounds=plan.rounds, cohort=fd.poisson(min(1.0, plan.cohort / len(population))), settings=settings,
            )  # fmt: skip
            rows.append({"": name} | {k: v for k, v in run_federation(made).final.items() if v is not None})
    return table(rows, title=f"after {plan.rounds} rounds of {plan.cohort:g} of {len(population)} clients")

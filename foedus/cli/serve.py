"""``foedus serve``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import OBJECT, Verb, load, place_of

if TYPE_CHECKING:
    from foedus.net.served import Served
    from foedus.net.serving import Serving


@click.command(
    "serve",
    cls=Verb,
    examples=(
        "foedus serve federation.py --rounds 20 --minimum 3",
        "foedus serve federation.py --host 0.0.0.0 --reached-as fl.hospital.example",
        "foedus serve heart.py lung.py --folder /srv/foedus --stay --population lung=clinics",
    ),
)
@click.argument("targets", metavar="MODULE:OBJECT...", nargs=-1, required=True)
@click.option("--rounds", type=click.IntRange(1), help="Rounds in all.")
@click.option("--cohort", type=click.IntRange(1), help="Clients per round: the first that come.")
@click.option("--seed", type=int, help="Everything random is a function of it.")
@click.option("--every", type=click.IntRange(0), help="Evaluate after each so many rounds.")
@click.option("--minimum", type=click.IntRange(1), help="Never sum up fewer contributors than this.")
@click.option("--clients", type=click.IntRange(1), help="Begin when so many have enrolled; by default the minimum.")
@click.option(
    "--population",
    "populations",
    multiple=True,
    metavar="[RUN=]NAME",
    help="Serve a run to those who were invited to this population only; may be repeated, for several runs.",
)
@click.option("--over-selection", type=click.FloatRange(1), help="Let in so many times the cohort.")
@click.option("--window", type=click.FloatRange(0, min_open=True), help="Seconds in which clients are let in.")
@click.option("--deadline", type=click.FloatRange(0, min_open=True), help="Seconds until uploads are not taken.")
@click.option(
    "--patience",
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which a client that is silent is taken for lost, where sums are masked.",
)
@click.option("--keeping", type=click.Choice(["ephemeral", "sealed", "durable"]), help="What may lie on a disk.")
@click.option("--folder", type=click.Path(path_type=Path), help="The server's own; gone on with if it has been used.")
@click.option("--host", help="The address to listen on; 127.0.0.1 by default, 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), help="8765 by default.")
@click.option("--reached-as", multiple=True, metavar="NAME", help="A host name that clients use; may be repeated.")
@click.option("--broker", help="kafka://host:9092, where gateways and workers are processes of their own.")
@click.option("--role", type=click.Choice(["all", "gateway", "aggregator", "coordinator"]), help="Of this process.")
@click.option("--database", help="postgresql://..., for several servers; by default SQLite in the folder.")
@click.option("--blobs", help="Where models lie, e.g. s3://bucket/path; by default in the folder.")
@click.option("--source", type=click.Path(exists=True, path_type=Path), help="Source for clients: a file or a folder.")
@click.option("--start", type=click.Path(exists=True, dir_okay=False), help="First weights (safetensors).")
@click.option("--device", help="For evaluation, e.g. cuda.")
@click.option("--insecure-loopback", is_flag=True, help="Plain HTTP on this machine, for trying things out.")
@click.option("--behind-proxy", is_flag=True, help="A reverse proxy ends TLS.")
@click.option("--stay", is_flag=True, help="Go on serving when all rounds are done.")
@click.option("--no-progress", is_flag=True, help="Print no join command.")
@click.option("--quiet", is_flag=True, help="Write no log, except of what fails.")
def command(targets: tuple[str, ...], quiet: bool, **flags: Any) -> None:
    """Serve federations to clients on other machines.

    MODULE:OBJECT names a foedus.Federation, as for `foedus simulate`. Prints the command by which clients join, and
    writes a line of JSON to standard error for whatever happens. Started again with the same --folder it goes on.
    """
    from foedus.net import logs
    from foedus.net.serve import serve_all

    if not quiet:
        logs.to_stream()
    settings = _settings(flags)
    names = [Path(place_of(target)[0].replace(".", "/").removesuffix("/py")).name for target in targets]
    runs = [_run(target, name, settings, flags) for target, name in zip(targets, names, strict=True)]
    runs = _peopled(runs, flags["populations"])
    if settings.source is None and len(targets) > 1:
        raise click.UsageError("several federations need one folder of source for clients: --source FOLDER")
    for record in serve_all(runs, settings):
        told = ", ".join(f"{name} {value:.4g}" for name, value in record.final.items() if value is not None)
        click.echo(f"after round {len(record.metrics)}: {told or 'not evaluated'}")
        click.echo(f"run folder: {record.folder}   (foedus plot {record.folder})")


def _settings(flags: dict[str, Any]) -> Serving:
    """What the flags say about the server."""
    from foedus.net.served import Keeping, Rounds
    from foedus.net.serving import Role, Serving

    rounds = ("minimum", "clients", "over_selection", "window", "deadline", "patience")
    each = {name: flags[name] for name in rounds if flags[name] is not None}
    if "deadline" in each and "window" not in each:
        each["window"] = min(300.0, each["deadline"])
    own = ("folder", "host", "port", "database", "blobs", "source", "start", "device", "broker")
    told = {name: flags[name] for name in own if flags[name] is not None}
    if flags["role"]:
        told["role"] = Role(flags["role"])
    if flags["keeping"]:
        told["keeping"] = Keeping(flags["keeping"])
    if flags["reached_as"]:
        told["names"] = list(flags["reached_as"])
    return Serving(
        **told, rounds=Rounds(**each), insecure_loopback=flags["insecure_loopback"],
        behind_proxy=flags["behind_proxy"], stay=flags["stay"], progress=not flags["no_progress"],
    )  # fmt: skip


def _peopled(runs: list[Served], told: tuple[str, ...]) -> list[Served]:
    """The runs, each with its population."""
    from dataclasses import replace

    found: dict[str, str] = {}
    for text in told:
        run, _, population = text.rpartition("=")
        for name in [run] if run else [each.name for each in runs]:
            found[name] = population
    if unknown := sorted(found.keys() - {each.name for each in runs}):
        known = ", ".join(each.name for each in runs)
        raise click.UsageError(f"--population {unknown[0]}=...: there is no run of this name; there is {known}")
    return [replace(each, population=found.get(each.name, "")) for each in runs]


def _run(target: str, name: str, settings: Serving, flags: dict[str, Any]) -> Served:
    """What is served of one file."""
    from dataclasses import replace

    from foedus.net.served import Served

    federation = load(target)
    place, object_ = place_of(target)
    module = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    evaluation = federation.evaluation
    if flags["every"] is not None:
        evaluation = replace(evaluation, every=flags["every"])
    given = {key: flags[key] for key in ("rounds", "cohort", "seed") if flags[key] is not None}
    own = {"rounds": federation.rounds, "cohort": federation.cohort, "seed": federation.seed} | given
    return Served(
        name=name, task=federation.task, algorithm=federation.algorithm, evaluation=evaluation, each=settings.rounds,
        keeping=settings.keeping, budget=federation.settings.budget, start=settings.start or federation.settings.start,
        central_test=federation.population().central_test, target=f"{module}:{object_ or OBJECT}",
        source=Path(settings.source) if settings.source else _source(place), **own,
    )  # fmt: skip


def _source(place: str) -> Path:
    """The file that clients get to train with."""
    if place.endswith(".py"):
        return Path(place)
    import sys

    return Path(str(sys.modules[place].__file__))

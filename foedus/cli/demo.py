"""``foedus demo``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb


@click.command("demo", cls=Verb, examples=("foedus demo", "foedus demo --folder my_demo --data digits"))
@click.option("--folder", default="runs/demo", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Choice(["digits", "mnist"]),
    help="By default MNIST if it is at hand, else the digits.",
)
def command(folder: Path, data: str | None) -> None:
    """What federated learning is, in two figures and a minute.

    It needs no internet. The first: what happens to every node's own model between two averagings. The second:
    what it costs when every node has mostly, or only, examples of one class. Called again, it goes on or shows
    the results.
    """
    from foedus.demo import demo

    demo(folder, data)

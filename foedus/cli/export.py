"""``foedus export``"""

from __future__ import annotations

from pathlib import Path

import click

from foedus.cli.verb import Verb, recorded


@click.command(
    "export",
    cls=Verb,
    examples=(
        "foedus export runs/first --to tensorboard        # then: tensorboard --logdir tensorboard",
        "foedus export runs/first runs/second --to mlflow --output http://localhost:5000",
    ),
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", "kind", required=True, type=click.Choice(["tensorboard", "mlflow"]), help="Which tool.")
@click.option("--output", help="TensorBoard: a folder. MLflow: a folder, server or database (a URI).")
@click.option("--experiment", default="foedus", show_default=True, help="MLflow's experiment.")
def command(runs: tuple[Path, ...], kind: str, output: str | None, experiment: str) -> None:
    """Copy the figures of runs into TensorBoard or MLflow.

    A folder without a run of its own stands for all the runs below it. To see a run
    there while it is going on, give the same sinks to Settings(sinks=[...]).
    """
    from foedus.record.export import MLflow, Sink, TensorBoard, export

    sink: Sink = MLflow(output, experiment) if kind == "mlflow" else TensorBoard(output or "tensorboard")
    for record in recorded(runs):
        export(record, sink)
        click.echo(f"{record.folder}: {len(record.metrics)} rounds written to {kind}")

"""Federated averaging of what comes back; when every round was done, in a file."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    told = context.run_config
    nodes, rounds, entries = (int(told[name]) for name in ("nodes", "rounds", "entries"))

    def mark(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        with Path(str(told["times"])).open("a") as times:
            print(number, time.time(), file=times)
        return None

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    start = ArrayRecord([np.zeros(entries, np.float32)])
    strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds, evaluate_fn=mark)

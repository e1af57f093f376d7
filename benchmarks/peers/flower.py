"""Flower (flwr) with its best settings: the message API, two Ray actors of one thread, data kept by the actors.

    benchmarks/peers/.venv-flower/bin/python benchmarks/peers/flower.py W1 --rounds 8

Flower wants a record per client before it starts, so W4 runs with 10,000 clients here instead of 100,000 (with
100,000 a round takes about three minutes). Rounds end when the server's evaluation function is called.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import measure
import models
import torch
import workloads

# user code begins
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

# user code ends

MOST_CLIENTS = 10_000


def simulate(chosen: workloads.Workload, count: int) -> measure.Rounds:
    rounds = measure.Rounds()

    def mark(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number:
            rounds.end()
        return None

    # user code begins
    from flower_client import app as client_app

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=chosen.cohort / chosen.clients,
            fraction_evaluate=0.0,
            min_train_nodes=chosen.cohort,
            min_available_nodes=chosen.clients,
        )
        start = ArrayRecord(models.NETWORKS[chosen.network]().state_dict())
        strategy.start(grid=grid, initial_arrays=start, num_rounds=count, evaluate_fn=mark)

    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": 2, "log_to_driver": False},
    }
    run_simulation(server_app, client_app, num_supernodes=chosen.clients, backend_config=backend)
    # user code ends
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=list(workloads.WORKLOADS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2, help="first rounds left out of the median (default 2)")
    asked = parser.parse_args()
    os.environ["BENCHMARK_WORKLOAD"] = asked.workload
    chosen = workloads.WORKLOADS[asked.workload]
    if chosen.clients > MOST_CLIENTS:
        chosen = workloads.workload(asked.workload, clients=MOST_CLIENTS)
    torch.set_num_threads(1)
    with measure.Watch() as watch:
        rounds = simulate(chosen, asked.rounds)
    from importlib.metadata import version

    measure.report(
        rounds,
        watch,
        skip=asked.skip,
        peer="flower",
        version=version("flwr"),
        workload=chosen.name,
        clients=chosen.clients,
        user_lines=measure.user_lines(__file__, HERE / "flower_client.py"),
    )


if __name__ == "__main__":
    main()

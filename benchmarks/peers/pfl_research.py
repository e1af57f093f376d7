"""pfl-research (pfl) with its best settings: two processes of one thread under torchrun, tensors kept in memory.

    benchmarks/peers/.venv-pfl/bin/python benchmarks/peers/pfl_research.py W1 --rounds 12

The script starts itself again under torchrun. pfl never shuffles by itself; the function that makes a client's data
does it here, so that every engine trains on shuffled data. It samples cohorts with replacement.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import measure

if "RANK" not in os.environ:
    os.environ["BENCHMARK_STARTED"] = str(measure.started())
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    os.execv(sys.executable, [sys.executable, *run, __file__, *sys.argv[1:]])

import models
import numpy as np
import torch
import workloads

# user code begins
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

# user code ends


class Mark(TrainingProcessCallback):
    """The end of a round."""

    def __init__(self, rounds: measure.Rounds) -> None:
        self.rounds = rounds

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.rounds.end()
        return False, Metrics()


def simulate(chosen: workloads.Workload, count: int) -> measure.Rounds:
    rounds = measure.Rounds()
    network = models.NETWORKS[chosen.network]
    if not chosen.generated:
        x, y = map(torch.from_numpy, workloads.pool(chosen.image))
        rows = torch.from_numpy(np.stack(workloads.partition(chosen)))

    # user code begins
    class Trained(network):
        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return models.loss(self(inputs), targets)

        @torch.no_grad()
        def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Weighted]:
            return {"loss": Weighted(self.loss(inputs, targets).item() * len(targets), len(targets))}

    def examples(client: int) -> Dataset:
        if chosen.generated:
            inputs, targets = map(torch.from_numpy, workloads.generated_client(client))
            order = torch.randperm(len(targets))
            return Dataset((inputs[order], targets[order]), user_id=str(client))
        order = rows[client][torch.randperm(rows.shape[1])]
        return Dataset((x[order], y[order]), user_id=str(client))

    torch.manual_seed(0)
    np.random.seed(0)
    trained = Trained()
    model = PyTorchModel(trained, torch.optim.SGD, torch.optim.SGD(trained.parameters(), lr=1.0))
    data = FederatedDataset(examples, get_user_sampler("random", range(chosen.clients)))
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=count,
            evaluation_frequency=count + 1,
            train_cohort_size=chosen.cohort,
            val_cohort_size=None,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workloads.LEARNING_RATE,
            local_batch_size=workloads.BATCH_SIZE,
        ),
        callbacks=[Mark(rounds)],
    )
    # user code ends
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=list(workloads.WORKLOADS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first rounds left out of the median (default 2)")
    asked = parser.parse_args()
    chosen = workloads.WORKLOADS[asked.workload]
    torch.set_num_threads(1)
    with measure.Watch(os.getppid()) as watch:
        rounds = simulate(chosen, asked.rounds)
    if os.environ["RANK"] != "0":
        return
    from importlib.metadata import version

    measure.report(
        rounds,
        watch,
        skip=asked.skip,
        peer="pfl",
        version=version("pfl"),
        workload=chosen.name,
        clients=chosen.clients,
        user_lines=measure.user_lines(__file__),
    )


if __name__ == "__main__":
    main()

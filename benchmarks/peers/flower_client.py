"""The client side of `flower.py`, in a module of its own so that Ray's actors import it instead of unpickling it.

What it keeps from message to message (data, network) is what makes Flower fastest here: an actor is reused for
many clients, and a client that loads its data anew each time would cost more than its training.
"""

from __future__ import annotations

import os
from functools import cache

import models
import numpy as np
import torch
import workloads

# user code begins
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
# user code ends

CHOSEN = workloads.WORKLOADS[os.environ.get("BENCHMARK_WORKLOAD", "W1")]


@cache
def _pool() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = map(torch.from_numpy, workloads.pool(CHOSEN.image))
    return x, y, torch.from_numpy(np.stack(workloads.partition(CHOSEN)))


def examples(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The client's data in a new random order."""
    if CHOSEN.generated:
        x, y = map(torch.from_numpy, workloads.generated_client(client))
        order = torch.randperm(len(y))
    else:
        x, y, rows = _pool()
        order = rows[client][torch.randperm(rows.shape[1])]
    return x[order], y[order]


# user code begins
@cache
def network() -> torch.nn.Module:
    torch.set_num_threads(1)
    return models.NETWORKS[CHOSEN.network]()


@app.train()
def train(message: Message, context: Context) -> Message:
    net = network()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(net.parameters(), lr=workloads.LEARNING_RATE)
    x, y = examples(context.node_config["partition-id"])
    for inputs, targets in zip(x.split(workloads.BATCH_SIZE), y.split(workloads.BATCH_SIZE), strict=True):
        optimiser.zero_grad()
        models.loss(net(inputs), targets).backward()
        optimiser.step()
    content = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord({"num-examples": len(y)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


# user code ends

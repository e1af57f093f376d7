"""Algorithms: values made of values.

An :class:`Algorithm` says what a client does (local training), how updates become one (an aggregator), and what
the server does with it (a server optimiser). Named variants are one-line compositions; a new one needs no class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from foedus.core.aggregate import Aggregator, mean
from foedus.core.client import Client, Schedule, local_sgd
from foedus.core.server import ServerOptimiser, sgd


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What happens in a round, from the received model to the next global model.

    Attributes:
        client: local training.
        aggregator: how the clients' updates become one update.
        server: what the server does with that update.
        buffers: how non-trainable buffers (BatchNorm statistics) are combined, if the task averages them.
    """

    client: Client
    aggregator: Aggregator = field(default_factory=mean)
    server: ServerOptimiser = field(default_factory=sgd)
    buffers: Aggregator = field(default_factory=mean)

    @property
    def label(self) -> str:
        return f"{self.client.label}, {self.aggregator.label}, server {self.server.label}"


def fedavg(
    client: Client, *, aggregator: Aggregator | None = None, server: ServerOptimiser | None = None
) -> Algorithm:
    """Federated averaging (McMahan et al. 2017): clients train for a while, the server averages.

    Args:
        client: local training, e.g. ``local_sgd(lr=0.1, epochs=1, batch_size=10)``.
        aggregator: by default the mean weighted by numbers of examples.
        server: by default the average becomes the model; ``server=adam(lr=0.01)`` makes it FedAdam.

    Example:
        >>> fedavg(local_sgd(lr=0.1)).server.label
        'sgd(lr=1.0)'
    """
    return Algorithm(client=client, aggregator=aggregator or mean(), server=server or sgd())


def fedsgd(lr: float | Schedule, *, aggregator: Aggregator | None = None) -> Algorithm:
    """Federated SGD, the naive baseline: one gradient over all of a client's data per round, averaged
    (McMahan et al. 2017, section 2). With every client in the cohort this is gradient descent on the pooled data.

    Example:
        >>> fedsgd(lr=0.1).client.batch_size is None
        True
    """
    return fedavg(local_sgd(lr, steps=1, batch_size=None), aggregator=aggregator)

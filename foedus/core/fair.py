"""Fair methods: the model is to serve every client (or kind of client) well, not the average one only.

Both measure how badly the received model does on a client's training examples, and let those count for more whom
it serves badly: q-FedAvg by a power of the loss, agnostic averaging by weights that grow with the loss of a domain.

Not here: figures client by client (``Evaluation(clients=True)``), models of each client's own (``core/personal.py``).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from foedus.core.aggregate import Aggregator, mean
from foedus.core.checks import check_number, check_whole
from foedus.core.client import Client, LocalTraining
from foedus.core.compose import Algorithm, composed
from foedus.core.method import Contribution, Gathered, Local, Measure, Method, Personal, Train, Visit
from foedus.core.server import ServerOptimiser
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.tree import Vector

LEAST_LOSS = 1e-10  # below it a power of a loss with a negative exponent is no number
LEAST_WEIGHT = 2.0**-18  # of a domain, relative to the mean one; sums count in units of 2⁻²⁰


def qfedavg(
    client: Client,
    *,
    q: float = 1.0,
    weighted: bool = True,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """q-FedAvg (Li et al. 2020, "Fair resource allocation in federated learning", algorithm 2): minimises
    ``Σ pᵢ Fᵢ^(q+1) / (q+1)``, so that clients with a great loss count for more; ``q=0`` is federated averaging.

    With ``L = 1 / learning rate``, a client sends ``Fᵢ^q L Δwᵢ`` and ``hᵢ = q Fᵢ^(q−1) ‖L Δwᵢ‖² + L Fᵢ^q``, and the
    server divides the sum of the first by that of the second. The paper draws clients with probability ``pᵢ``; here
    cohorts are drawn evenly and both are weighted.

    Args:
        client: local training; it must say its learning rate.
        q: how much fairness; 0 for none, tens for nearly the worst client only.
        weighted: ``pᵢ`` is the share of examples; otherwise all clients have the same.
        aggregator, server, personal: as for ``fedavg``.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> qfedavg(local_sgd(lr=0.1), q=2.0).method.label
        'qfedavg(q=2.0, weighted=True)'
    """
    check_number("q", q)

    def fits(client: Client) -> None:
        if isinstance(client, LocalTraining) and client.lr is None:
            raise ConfigurationError(
                f"qfedavg() divides by the learning rate, and {client.label} does not say its own: give "
                "local_training(..., lr=0.1)"
            )

    def local(visit: Visit) -> Local:
        loss = max((yield Measure(visit.received))["loss"], LEAST_LOSS)  # NaN stays NaN, and is refused
        trained = yield Train()
        steep = 1 / _rate(visit)
        scaled = (trained.vector - visit.received) * steep
        long = float(np.square(scaled, dtype=np.float64).sum())
        divisor = q * loss ** (q - 1) * long + steep * loss**q
        weight, sides = float(visit.examples) if weighted else 1.0, {"divisor": np.array([divisor])}
        return Contribution.of(trained, visit)._replace(update=scaled * loss**q, weight=weight, sides=sides)

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        return gathered.update / gathered.sides["divisor"], gathered.state

    label = f"qfedavg(q={q}, weighted={weighted})"
    method = Method(
        local,
        label,
        sides={"divisor": mean()},
        finish=finish,
        unscaled=True,
        fits=fits,
        lengths=lambda layout: {"divisor": 1},
        looks=True,
    )
    return composed(client, method, aggregator=aggregator, server=server, personal=personal)


def afl(
    client: Client,
    *,
    domains: Sequence[int],
    step: float = 0.1,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """Agnostic federated averaging: the model is trained for the worst mixture of domains
    (Mohri et al. 2019, "Agnostic federated learning"; the averaging form by Ro et al. 2021, "Communication-efficient
    agnostic federated averaging").

    The server holds a weight for every domain, ``λ ← λ exp(step · loss) / Σ``; a client's update counts by the weight
    of its domain, divided among the domain's examples in a round (as many as in the last one that had any). Losses
    travel as sums per domain, so that the server need not see those of a single client; a domain that is absent from
    a round goes on with the loss it had.

    Args:
        client: local training.
        domains: of every client, by position: whole numbers from 0, such as regions or kinds of device; for a few
            large clients ``range(number of clients)``.
        step: how fast weights follow losses. Weights keep at least 2⁻¹⁸ of the mean one.
        aggregator, server, personal: as for ``fedavg``.

    Raises:
        ConfigurationError: ``domains`` are not whole numbers, one for every client.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> afl(local_sgd(lr=0.1), domains=[0, 0, 1]).method.label
        'afl(2 domains 6f6bcabe, step=0.1)'
    """
    check_number("step", step, above=True)
    where = _domains(domains)
    count = int(where.max()) + 1

    def init(vector: Vector, population: int) -> State:
        if population != len(where):
            raise ConfigurationError(
                f"afl(domains=...) gives the domains of {len(where)} clients, and there are {population}"
            )
        return {"weights": np.full(count, 1 / count), "losses": np.zeros(count), "examples": np.ones(count)}

    def local(visit: Visit) -> Local:
        loss, own = (yield Measure(visit.received))["loss"], int(where[visit.client])
        told = np.zeros((2, count))
        told[:, own] = visit.examples * loss, visit.examples
        trained = yield Train()
        weight = float(np.clip(visit.examples * visit.down["weights"][own], 2.0**-19, 2.0**31))  # what sums hold
        return Contribution.of(trained, visit)._replace(weight=weight, sides={"losses": told.reshape(-1)})

    def down(state: State) -> State:
        weights = np.maximum(state["weights"] * count, LEAST_WEIGHT)
        return {"weights": weights * state["examples"].mean() / state["examples"]}

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        summed, examples = gathered.sides["losses"].reshape(2, count) * gathered.senders
        there = examples > 0
        losses = np.where(there, summed / np.where(there, examples, 1), gathered.state["losses"])
        grown = gathered.state["weights"] * np.exp(step * (losses - losses.max()))
        examples = np.where(there, examples, gathered.state["examples"])
        return gathered.update, {"weights": grown / grown.sum(), "losses": losses, "examples": examples}

    label = f"afl({count} domains {zlib.crc32(where.tobytes()):08x}, step={step})"
    sides = {"losses": mean(weighted=False)}
    method = Method(local, label, init, down, sides, finish, lengths=lambda layout: {"losses": 2 * count}, looks=True)
    return composed(client, method, aggregator=aggregator, server=server, personal=personal)


def _rate(visit: Visit) -> float:
    if not visit.rate:
        raise ConfigurationError(
            f"qfedavg() divides by the learning rate, which is {visit.rate} in round {visit.round} of "
            f"{visit.spec.label}; give local training an lr above 0"
        )
    return visit.rate


def _domains(domains: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    found = list(domains)
    if not found:
        raise ConfigurationError("afl(domains=...) needs the domain of every client, and the list is empty")
    for domain in found:
        check_whole("a domain", domain, least=0)
    return np.array(found, np.int64)

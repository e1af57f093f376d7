"""Methods against client drift: what local training loses where clients' data differ, and how it is won back.

Clients that take many local steps each walk towards their own optimum, and the mean of where they end is not the
optimum of all. The methods here correct that: by shifting every local gradient (SCAFFOLD, FedDyn, MimeLite), by
a momentum that goes on from client to client (averaged momentum), or by what the server makes of updates of unequal
numbers of steps (FedNova). Each is a function from local training to an :class:`~foedus.core.compose.Algorithm`.

Momentum that every client begins anew is ``local_sgd(momentum=...)``, the server's own is ``fedavg(client,
server=momentum())``, FedProx is a penalty of local training. Not here: fairness
(``core/fair.py``), models of each client's own (``core/personal.py``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, mean
from foedus.core.checks import check_number
from foedus.core.client import Client, LocalSGD, Penalty, descend, local_sgd, proximal
from foedus.core.compose import Algorithm, composed
from foedus.core.method import Contribution, Gathered, Local, Method, Personal, Train, Visit, zeros
from foedus.core.server import ServerOptimiser
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.tree import Vector

# One step of gradient descent over all of a client's examples, of length one: the received weights minus what it
# gives are the gradient there. One object, so that it is prepared once.
WHOLE = local_sgd(lr=1.0, steps=1, batch_size=None)


def scaffold(
    client: Client,
    *,
    full_gradient: bool = False,
    weighted: bool = True,
    control: Aggregator | None = None,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """SCAFFOLD (Karimireddy et al. 2020, "SCAFFOLD: Stochastic controlled averaging for federated learning",
    algorithm 1): every local gradient is corrected by ``c − cᵢ``, the difference of all clients' mean gradient and
    the client's own, as last seen.

    Each client keeps its ``cᵢ`` [parameter]; the server sends ``c`` and is sent ``Δcᵢ``: twice the bytes of federated
    averaging both ways.

    Args:
        client: local training. With momentum or a proximal term, option II divides by the sum of the steps'
            coefficients (Wang et al. 2020) instead of their number; if gradients are clipped, so is ``cᵢ``.
        full_gradient: how ``cᵢ`` is renewed: by the gradient at the received model over all of the client's examples
            (option I: one more pass, and steadier), or from the local steps (option II).
        weighted: clients count by their number of examples; otherwise, as in the paper, all the same. ``c`` is
            weighted alike, since with other weights the optimum would be no fixed point.
        control: how ``Δcᵢ`` is aggregated, by default exactly; compressed it is by, say,
            ``error_feedback(chain(top_k(0.1), mean()))``.
        aggregator, server, personal: as for ``fedavg``; the paper's global step size is ``server=sgd(lr=...)``.

    Raises:
        ConfigurationError: ``client`` is a training loop of the user's own.

    Example:
        >>> scaffold(local_sgd(lr=0.1, epochs=5)).method.label
        'scaffold(full_gradient=False, weighted=True)'
    """
    _check_steps("scaffold", client)

    def local(visit: Visit) -> Local:
        own, common = visit.kept.get("control", zeros(visit.received)), visit.down["control"]
        whole = (yield Train(spec=WHOLE)) if full_gradient else None
        trained = yield Train(shift=common - own)
        new, moved = own, trained.vector - visit.received
        if whole is not None:
            new = visit.received - whole.vector
        elif visit.rate:
            spec = _check_steps("scaffold", visit.spec)
            new = own - common - moved / (visit.rate * stretch(spec, trained.steps, visit.rate))
        weight, sizes = share(visit, weighted, first="control" not in visit.kept)
        sides = {"control": new - own, "sizes": sizes}
        return Contribution.of(trained, visit)._replace(weight=weight, sides=sides, kept={"control": new})

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        sums = grown(gathered)
        common = sums.summed(gathered.state["control"], gathered.sides["control"])
        return gathered.update, {"control": common, "seen": sums.seen}

    method = Method(
        local,
        f"scaffold(full_gradient={full_gradient}, weighted={weighted}{_told(control)})",
        init=lambda vector, population: {"control": zeros(vector), "seen": np.zeros(3)},
        down=lambda state: {"control": state["control"]},
        sides={"control": control or mean(), "sizes": mean(weighted=False)},
        finish=finish,
        lengths=lambda layout: {"control": layout.size, "sizes": 3},
    )
    return composed(client, method, aggregator=aggregator, server=server, personal=personal)


def feddyn(
    client: Client,
    *,
    alpha: float = 0.1,
    weighted: bool = True,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """FedDyn (Acar et al. 2021, "Federated learning based on dynamic regularization", algorithm 1): each client
    adds ``−⟨gᵢ, θ⟩ + α/2 ‖θ − received‖²`` to its loss, where ``gᵢ ← gᵢ − α (θᵢ − received)`` is its gradient as last
    seen, so that the optimum of all is where every client stays. Costs no bytes beyond federated averaging's.

    The server's ``h`` is kept as ``−h/α``: the (weighted) mean over *all* clients of the sums of their updates. A lossy
    chain makes it differ from what clients sum up; keep to exact aggregation, or use ``scaffold``.

    Args:
        client: local training; its own penalty, if any, is added.
        alpha: how strongly clients are held; small for many local steps (0.01 … 0.1 in the paper).
        weighted: clients count by their number of examples; otherwise, as in the paper, all the same.
        aggregator, server, personal: as for ``fedavg``.

    Raises:
        ConfigurationError: ``client`` is a training loop of the user's own, or ``alpha`` is not above 0.

    Example:
        >>> feddyn(local_sgd(lr=0.1, epochs=5), alpha=0.01).method.label
        'feddyn(alpha=0.01, weighted=True)'
    """
    client = _check_steps("feddyn", client)
    check_number("alpha", alpha, above=True)
    held = replace(client, penalty=_both(client.penalty, proximal(alpha)))

    def local(visit: Visit) -> Local:
        own = visit.kept.get("gradient", zeros(visit.received))
        trained = yield Train(shift=-own)
        weight, sizes = share(visit, weighted, first="gradient" not in visit.kept)
        kept = {"gradient": own - alpha * (trained.vector - visit.received)}
        return Contribution.of(trained, visit)._replace(weight=weight, sides={"sizes": sizes}, kept=kept)

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        sums = grown(gathered)
        drift = sums.summed(gathered.state["drift"], gathered.update)
        return gathered.update + drift, {"drift": drift, "seen": sums.seen}

    method = Method(
        local,
        f"feddyn(alpha={alpha}, weighted={weighted})",
        init=lambda vector, population: {"drift": np.zeros(vector.shape), "seen": np.zeros(3)},
        sides={"sizes": mean(weighted=False)},
        finish=finish,
        unscaled=True,
        lengths=lambda layout: {"sizes": 3},
    )
    return composed(held, method, aggregator=aggregator, server=server, personal=personal)


def fednova(
    client: Client,
    *,
    weighted: bool = True,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """FedNova (Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated
    optimization", section 4): updates are divided by how far their client's steps would have gone along a gradient of
    one, and their mean is multiplied by the mean of that, so that clients with more steps do not draw the model to
    themselves.

    ``‖aᵢ‖₁``, the sum of the coefficients of a client's gradients in its update, is found by taking its steps along a
    gradient of one; that covers momentum and quadratic penalties in any combination, and is the number of steps for
    plain SGD. Costs eight bytes beyond federated averaging's. Where all clients take as many steps it *is* federated
    averaging.

    Args:
        client: local training.
        weighted: clients count by their number of examples; otherwise all the same.
        aggregator, server, personal: as for ``fedavg``.

    Raises:
        ConfigurationError: ``client`` is a training loop of the user's own.

    Example:
        >>> fednova(local_sgd(lr=0.1, epochs=5, momentum=0.9)).method.label
        'fednova(weighted=True)'
    """
    _check_steps("fednova", client)

    def local(visit: Visit) -> Local:
        trained = yield Train()
        length = stretch(_check_steps("fednova", visit.spec), trained.steps, visit.rate)
        return Contribution.of(trained, visit)._replace(
            update=(trained.vector - visit.received) / length,
            weight=_weight(visit, weighted),
            sides={"length": np.array([length])},
        )

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        return gathered.update * gathered.sides["length"], gathered.state

    method = Method(
        local,
        f"fednova(weighted={weighted})",
        sides={"length": mean()},
        finish=finish,
        lengths=lambda layout: {"length": 1},
    )
    return composed(client, method, aggregator=aggregator, server=server, personal=personal)


def mime_lite(
    client: Client,
    *,
    beta: float = 0.9,
    weighted: bool = True,
    gradient: Aggregator | None = None,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """MimeLite with momentum (Karimireddy et al. 2021, "Breaking the centralized barrier for cross-device federated
    learning", algorithm 1): local steps go along ``(1 − β) ∇f + β m`` with the *server's* momentum ``m``, which stays
    as it is for the round, and is renewed by the clients' full gradients at the received model.

    Clients keep nothing, so that it suits populations in which everybody takes part once. Twice the bytes of
    federated averaging both ways, and one more pass over the data.

    Args:
        client: local training.
        beta: how much of the momentum is kept from round to round, in [0, 1).
        weighted: clients count by their number of examples; otherwise, as in the paper, all the same.
        gradient: how the full gradients are aggregated, by default exactly.
        aggregator, server, personal: as for ``fedavg``.

    Raises:
        ConfigurationError: ``client`` is a training loop of the user's own, or ``beta`` not in [0, 1).

    Example:
        >>> mime_lite(local_sgd(lr=0.1, epochs=5)).method.label
        'mime_lite(beta=0.9, weighted=True)'
    """
    client = _check_steps("mime_lite", client)
    check_number("beta", beta, below=1)
    # (1 − β) g + β m = (1 − β) (g + β / (1 − β) m): a smaller learning rate, and the same shift in every step.
    slower = replace(client, lr=lambda round: (1 - beta) * client.rate(round))

    def local(visit: Visit) -> Local:
        whole = yield Train(spec=WHOLE)
        trained = yield Train(shift=beta / (1 - beta) * visit.down["momentum"], spec=slower)
        sides = {"gradient": visit.received - whole.vector}
        return Contribution.of(trained, visit)._replace(weight=_weight(visit, weighted), sides=sides)

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        old = gathered.state["momentum"]
        new = (1 - beta) * gathered.sides["gradient"] + beta * old
        return gathered.update, {"momentum": new.astype(old.dtype)}

    method = Method(
        local,
        f"mime_lite(beta={beta}, weighted={weighted}{'' if gradient is None else f', gradient={gradient.label}'})",
        init=lambda vector, population: {"momentum": zeros(vector)},
        down=lambda state: state,
        sides={"gradient": gradient or mean()},
        finish=finish,
        lengths=lambda layout: {"gradient": layout.size},
    )
    return composed(client, method, aggregator=aggregator, server=server, personal=personal)


def averaged_momentum(
    client: Client,
    *,
    weighted: bool = True,
    momenta: Aggregator | None = None,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
    personal: Personal | None = None,
) -> Algorithm:
    """Local SGD with momentum whose momenta are averaged like the models (Yu, Jin & Yang 2019, "On the linear speedup
    analysis of communication efficient momentum SGD for distributed non-convex optimization", algorithm 1): clients
    begin with the mean of the momenta ``u ← β u + ∇f`` that the last cohort ended with, instead of zeros.

    Clients keep nothing; with all of them in every cohort and one local step it *is* SGD with momentum on all data.
    Twice the bytes of federated averaging both ways.

    Args:
        client: local training with momentum, ``local_sgd(..., momentum=0.9)``.
        weighted: clients count by their number of examples; otherwise, as in the paper, all the same.
        momenta: how these are aggregated; by default exactly, weighted as the updates are.
        aggregator, server, personal: as for ``fedavg``.

    Raises:
        ConfigurationError: ``client`` is a training loop of the user's own, or has no momentum.

    Example:
        >>> averaged_momentum(local_sgd(lr=0.1, momentum=0.9)).method.label
        'averaged_momentum(weighted=True)'
    """
    if not _check_steps("averaged_momentum", client).momentum:
        raise ConfigurationError(
            "averaged_momentum() averages what clients' momenta end with, and these have none: write "
            "local_sgd(..., momentum=0.9)"
        )

    def local(visit: Visit) -> Local:
        trained = yield Train(momenta=visit.down["momentum"])
        sides = {"momentum": trained.momenta}
        return Contribution.of(trained, visit)._replace(weight=_weight(visit, weighted), sides=sides)

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        return gathered.update, {"momentum": gathered.sides["momentum"].astype(gathered.vector.dtype)}

    method = Method(
        local,
        f"averaged_momentum(weighted={weighted}{'' if momenta is None else f', momenta={momenta.label}'})",
        init=lambda vector, population: {"momentum": zeros(vector)},
        down=lambda state: state,
        sides={"momentum": momenta or mean()},
        finish=finish,
        counts=False,
        lengths=lambda layout: {"momentum": layout.size},
    )
    return composed(client, method, aggregator=aggregator, server=server, personal=personal)


# --- what they share ----------------------------------------------------------------------------------------


def stretch(spec: LocalSGD, steps: int, rate: float) -> float:
    """``‖a‖₁``: the sum of the coefficients with which the gradients of a client's steps enter its update, in units
    of the learning rate (Wang et al. 2020, section 3).

    Found by walking along a gradient of one; weight decay counts as part of the gradient.

    Example:
        >>> stretch(local_sgd(lr=0.1), 5, 0.1), stretch(local_sgd(lr=0.1, momentum=0.5), 2, 0.1)
        (5.0, 2.5)
    """
    if not rate or (not spec.momentum and spec.penalty is None):
        return float(steps)
    return _walked(replace(spec, lr=0.0, weight_decay=0.0, clip_norm=None), steps, rate)


@lru_cache(maxsize=4096)
def _walked(bare: LocalSGD, steps: int, rate: float) -> float:
    at: list[Any] = [np.zeros(1)]
    memory, received, ahead = [np.zeros(1)], [np.zeros(1)], [np.ones(1)]
    for _ in range(steps):
        at, memory = descend(bare, at, ahead, memory=memory, received=received, lr=rate)
    return float(-at[0][0] / rate)


class Grown(NamedTuple):
    """A sum over all clients of the population, after a round, in a form that needs no sums of sizes beforehand.

    What the server keeps is ``Σ nᵢ vᵢ / (N · n̄)`` over those who ever sent: N clients in all, of which n̄ is the mean
    size as far as known. Every client's summand is replaced by itself plus what it sends. N may change where data
    arrives over rounds.

    Attributes:
        total: Σ nᵢ of the round's senders.
        before, after: N · n̄ before and after the round.
        seen: float64 [3]: Σ nᵢ and number of the clients who ever sent, and N.
    """

    total: float
    before: float
    after: float
    seen: NDArray[np.float64]

    def summed(self, kept: Vector, mean: Vector) -> Vector:
        """The new sum [parameter] from the old one and the round's weighted mean, in the dtype of the old."""
        new: Vector = (kept * self.before + mean * self.total) / self.after
        return new.astype(kept.dtype)


def share(visit: Visit, weighted: bool, *, first: bool) -> tuple[float, NDArray[np.float64]]:
    """A client's weight n, and for the side channel ``sizes``: n, and n and 1 if it sends for the first time."""
    weight = _weight(visit, weighted)
    return weight, np.array([weight, weight * first, float(first)])


def _weight(visit: Visit, weighted: bool) -> float:
    return float(visit.examples) if weighted else 1.0


def grown(gathered: Gathered) -> Grown:
    """See :class:`Grown`; the state has ``seen``, and there are senders."""
    total, fresh, count = gathered.sides["sizes"] * gathered.senders
    old = gathered.state["seen"]
    seen = np.array([old[0] + fresh, old[1] + count, gathered.population])
    before, after = (float(n * total / count) if count else 0.0 for total, count, n in (old, seen))
    return Grown(float(total), before, after, seen)


def _both(first: Penalty | None, second: Penalty) -> Penalty:
    """The sum of two penalties."""
    if first is None:
        return second
    return Penalty(
        lambda w, received: first.value(w, received) + second.value(w, received),
        lambda w, received: first.gradient(w, received) + second.gradient(w, received),
        f"{first.label} + {second.label}",
    )


def _told(control: Aggregator | None) -> str:
    return "" if control is None else f", control={control.label}"


def _check_steps(verb: str, client: Client) -> LocalSGD:
    if not isinstance(client, LocalSGD):
        label = getattr(client, "label", repr(client))
        raise ConfigurationError(
            f"{verb}() corrects or counts the steps of local_sgd(), e.g. {verb}(local_sgd(lr=0.1)); {label} takes "
            "steps of its own"
        )
    return client

"""Communication when it is worth it: clients that send only if their model moved far enough since their last message.

Wrappers of a method. A silent client sends nothing at all; how many of a round's clients sent, and the bytes, are in
the round's record (``senders``, ``bytes_up``).

Not here: smaller messages (``core/stage.py`` and the stages), fewer clients (``core/select.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from foedus.core.aggregate import mean
from foedus.core.checks import check_number, check_whole
from foedus.core.drift import grown, share
from foedus.core.method import Contribution, Gathered, Local, Method, Visit, averaging, unchanged, zeros
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.tree import Vector


def lazy(method: Method | None = None, *, share: float) -> Method:
    """The norm rule: a client sends when its model moved by more than a share of the received model's length since
    its last message.

    What it does not send it keeps, adds to its next update, and sends with it: nothing that was learned is lost,
    only late. Silent clients count as an update of nothing. (Hsieh et al. 2017, "Gaia: Geo-distributed machine learning
    approaching LAN speeds", section 3.2, for the whole model at once.)

    Args:
        method: what clients do otherwise; by default they train and send the update.
        share: of ‖received‖, e.g. 0.01; with 0 everybody sends whatever moved.

    Raises:
        ConfigurationError: the method has sums on the server that silent clients would falsify.

    Example:
        >>> lazy(share=0.01).label
        'lazy(plain(), share=0.01)'
    """
    check_number("share", share)
    inner = _without_sums("lazy", method)

    def local(visit: Visit) -> Local:
        brought = yield from inner.local(visit)
        if brought.update is None:
            return brought._replace(kept=visit.kept)
        total = visit.kept.get("lazy.unsent", zeros(visit.received)) + brought.update
        if _long(total) >= share * _long(visit.received) or not np.isfinite(total).all():
            return _sent(brought, total, {})
        return _silent(brought, {"lazy.unsent": total})

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if gathered.update is None:
            return None, gathered.state
        return gathered.update * (gathered.senders / gathered.visited), gathered.state

    return inner._replace(local=local, finish=finish, label=f"lazy({inner.label}, share={share})", silent=True)


def lag(method: Method | None = None, *, rounds: int = 10, xi: float | None = None) -> Method:
    """Lazily aggregated gradients: LAG-WK (Chen et al. 2018, "LAG: Lazily aggregated gradient for
    communication-efficient distributed learning", algorithm 1).

    The server goes on with the last update of every client; a client sends the difference to its last one, and only if
    ``‖difference‖² ≥ ξ Σ ‖wᵏ⁺¹⁻ᵈ − wᵏ⁻ᵈ‖²`` over the last D steps of the model. With one full local step it is the
    paper's; with more it is the same for their sum. The model's steps are taken to be what the server is handed,
    which they are with ``server=sgd(lr=1.0)``.

    Args:
        method: what clients do otherwise; by default they train and send the update.
        rounds: D, how many steps of the model are remembered.
        xi: ξ; by default 1 / D.

    Raises:
        ConfigurationError: the method has sums on the server of its own.

    Example:
        >>> lag(rounds=10).label
        'lag(plain(), rounds=10, xi=0.1)'
    """
    check_whole("rounds", rounds, least=1)
    xi = 1 / rounds if xi is None else xi
    check_number("xi", xi)
    inner = _without_sums("lag", method)

    def local(visit: Visit) -> Local:
        brought = yield from inner.local(visit)
        if brought.update is None:
            return brought._replace(kept=visit.kept)
        last = visit.kept.get("lag.sent")
        change = brought.update if last is None else brought.update - last
        if not _long(change) ** 2 < visit.down["limit"][0]:  # NaN is sent, and refused
            weight, sizes = share(visit, True, first=last is None)
            brought = brought._replace(sides={"sizes": sizes}, weight=weight)
            return _sent(brought, change, {"lag.sent": brought.update})
        return _silent(brought, {} if last is None else {"lag.sent": last})

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        state = dict(gathered.state)
        if gathered.update is not None:
            change = grown(gathered)
            state |= {"sum": change.summed(state["sum"], gathered.update), "seen": change.seen}
        state["steps"] = np.append(state["steps"][1:], _long(state["sum"]) ** 2)
        return state["sum"], state

    return inner._replace(
        local=local,
        label=f"lag({inner.label}, rounds={rounds}, xi={xi:g})",
        init=lambda vector, population: {
            "sum": np.zeros(vector.shape), "seen": np.zeros(3), "steps": np.zeros(rounds),
        },
        down=lambda state: {"limit": np.array([xi * state["steps"].sum()])},
        sides={"sizes": mean(weighted=False)},
        finish=finish,
        unscaled=True,
        lengths=lambda layout: {"sizes": 3},
        silent=True,
    )  # fmt: skip


def _without_sums(verb: str, method: Method | None) -> Method:
    inner = averaging() if method is None else method
    if inner.sides or inner.finish is not unchanged:
        raise ConfigurationError(
            f"{verb}() lets clients stay silent, and the server of {inner.label} keeps sums to which all must send. "
            f"Use {verb}() with federated averaging, or another aggregator (chain(top_k(...), mean())) to save bytes"
        )
    return inner


def _sent(brought: Contribution, update: Vector, kept: dict[str, Any]) -> Contribution:
    return brought._replace(update=update, kept={**brought.kept, **kept}, report={**brought.report, "sent": 1.0})


def _silent(brought: Contribution, kept: dict[str, Any]) -> Contribution:
    return brought._replace(update=None, kept={**brought.kept, **kept}, report={**brought.report, "sent": 0.0})


def _long(vector: Vector) -> float:
    return float(np.sqrt(np.square(vector, dtype=np.float64).sum()))

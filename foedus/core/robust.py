"""Robust aggregation: rules that need every single update, because some of them may be lies.

A mean can be moved anywhere by one client. The rules here look at all updates of a round side by side
[client, parameter] and give an update that a minority cannot move far. :func:`collect` makes an aggregator of a rule:
a message is admitted as entries under its client's name, and merging is the union of the entries, which is
commutative to the bit and finds a client that is counted twice. Such an aggregator is not additive: nobody can
compute a median from a sum, so these rules cannot run where only sums are seen (``core/gate.py`` says so).

Memory is what the updates take, 4 · clients · parameters bytes: rules go through the rows blockwise and make no
second matrix. What each rule costs beyond is said there.

Which one? docs/howto/robustness.md. Norm bounding (Sun et al. 2019, "Can you really backdoor federated learning?")
needs no rule: ``chain(clip(radius), mean(weighted=False))``, which stays additive.

Not here: checks of one update by itself (``core/gate.py``), scores (``core/scores.py``), attacks (``core/attacks.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator
from foedus.core.checks import check_number, check_whole
from foedus.core.random import generator
from foedus.core.values import Context, Message, State, Update
from foedus.errors import ConfigurationError, Reason, UpdateRefused
from foedus.tree import Layout, Vector

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

Floats = NDArray[np.float64]
Rows = Sequence[Vector] | NDArray[np.floating]  # one [parameter] per client, or a matrix

_BLOCK = 1 << 20  # values per pass that are turned into float64, 8 MB
_SORTED = 1 << 10  # parameters per pass where all clients' values are sorted: they stay in the cache
_LARGEST = 1e140  # values whose squares can be added in float64


class Collected(NamedTuple):
    """What a rule is given: the updates of a round, in the order of their clients.

    Attributes:
        rows: the updates, one [parameter] for each client, not stacked.
        weights: what each client says it counts, [client].
        clients: their positions in the population, [client], increasing.
        state: what the aggregator kept from the last round.
        context: of the server, in this round.
    """

    rows: Sequence[Vector]
    weights: Float64[Floats, " client"]
    clients: Int64[NDArray[np.int64], " client"]
    state: State
    context: Context


Rule = Callable[[Collected], Vector]


def collect(
    rule: Rule,
    label: str,
    *,
    init: Callable[[Layout], State] = lambda layout: {},
    keep: Callable[[Collected, Vector], State] = lambda collected, vector: collected.state,
    least: int = 1,
) -> Aggregator:
    """An aggregator that gathers every update and leaves the rest to a rule.

    Args:
        rule: all updates -> the update of the global model [parameter]. It does not depend on the order in which
            updates came, because it is given them by client.
        label: how it is written.
        init: what the server keeps at first.
        keep: what it keeps after a round, from the updates and the rule's result.
        least: how many updates the rule needs.

    Raises:
        UpdateRefused: on admitting, for values that are not finite or of another length; on merging, for a client
            that is counted already.

    Example, whole: the update of the client who moved least:

        >>> def smallest(collected: Collected) -> Vector:
        ...     return min(collected.rows, key=np.linalg.norm)
        >>> rule = collect(smallest, "smallest()")
        >>> contexts = [Context(seed=0, round=1, client=c) for c in range(2)]
        >>> updates = [Update(np.array(v, "f4"), weight=1) for v in ([3.0, 4.0], [1.0, 0.0])]
        >>> a, b = (rule.admit(rule.encode(u, c), c) for u, c in zip(updates, contexts))
        >>> rule.decode({}, rule.merge(a, b), contexts[0])[0].tolist()
        [1.0, 0.0]
    """

    def encode(update: Update, context: Context) -> Message:
        return {"values": update.vector, "weight": np.array([update.weight], np.float64)}

    def decode(state: State, message: Message, context: Context) -> tuple[Vector, State]:
        collected = collected_of(message, state, context)
        vector = rule(collected)
        return vector, keep(collected, vector)

    return Aggregator(init, encode, _union, decode, additive=False, label=label, admit=_admitted, least=least)


def _admitted(message: Message, context: Context) -> Message:
    """One client's message as entries under its name."""
    values = message["values"]
    peak = float(max(values.max(initial=0.0), -values.min(initial=0.0)))
    if not peak < _LARGEST:
        raise UpdateRefused(
            f"the update of client {context.client} has values that are not finite, or beyond {_LARGEST:g}",
            client=context.client, reason=Reason.NOT_FINITE,
        )  # fmt: skip
    if values.ndim != 1 or (context.size and len(values) != context.size):
        raise UpdateRefused(
            f"the update of client {context.client} has the shape {values.shape}, and the model has "
            f"{context.size} parameters", client=context.client, reason=Reason.SHAPE,
        )  # fmt: skip
    weight = message["weight"]
    if weight.shape != (1,) or not 0 < weight[0] < np.inf:
        raise UpdateRefused(
            f"client {context.client} claims the weight {weight.tolist()}, and a weight is one number above 0",
            client=context.client,
            reason=Reason.WEIGHT,
        )
    return {f"{context.client}.values": values, f"{context.client}.weight": weight}


def _union(a: Message, b: Message) -> Message:
    """The entries of both. Adds to the dict ``a``, so that collecting n clients one by one takes n steps."""
    if twice := a.keys() & b.keys():
        client = int(min(twice).partition(".")[0])
        raise UpdateRefused(
            f"client {client} is counted already in this round; the same message came twice, or another in its name",
            client=client, reason=Reason.REPLAY,
        )  # fmt: skip
    a.update(b)
    return a


def collected_of(message: Message, state: State, context: Context) -> Collected:
    """The merged message of :func:`collect`, by client."""
    clients = sorted(int(name.partition(".")[0]) for name in message if name.endswith(".values"))
    rows = [message[f"{c}.values"] for c in clients]
    if any(row.shape != rows[0].shape for row in rows):
        lengths = sorted({row.shape[0] for row in rows})
        raise ConfigurationError(f"updates of {lengths[0]} and {lengths[-1]} entries cannot be compared")
    weights = np.array([message[f"{c}.weight"][0] for c in clients], np.float64)
    return Collected(rows, weights, np.array(clients, np.int64), state, context)


# --- parameter by parameter ---------------------------------------------------------------------------------


def median() -> Aggregator:
    """The median of every parameter by itself. Ignores weights.

    Withstands fewer attackers than half of the cohort: the result lies within the honest values of every
    parameter. The mean of the two middle values if their number is even.

    Source: Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-robust distributed learning: towards optimal statistical
    rates", definition 1. Cost: one sort of the values of each parameter.

    Example:
        >>> median().label
        'median()'
    """

    def middle(values: Vector) -> Vector:
        clients = values.shape[1]
        found: Vector = values[:, (clients - 1) // 2 : clients // 2 + 1].mean(axis=1, dtype=np.float64)
        return found

    return collect(lambda c: by_parameter(c.rows, middle), "median()")


def trimmed_mean(share: float) -> Aggregator:
    """Of every parameter the mean without its largest and smallest values. Ignores weights.

    Withstands ``⌊share · clients⌋`` attackers.

    Source: Yin et al. 2018, definition 2 (their β). Cost: one sort of the values of each parameter.

    Args:
        share: of the values to leave out at *each* end, from 0 and below 0.5.

    Example:
        >>> trimmed_mean(0.2).label
        'trimmed_mean(0.2)'
    """
    check_number("share", share, below=0.5)

    def inner(values: Vector) -> Vector:
        clients = values.shape[1]
        out = int(share * clients + 1e-9)  # 0.29 · 100 is 28.999999999999996
        found: Vector = values[:, out : clients - out].mean(axis=1, dtype=np.float64)
        return found

    return collect(lambda c: by_parameter(c.rows, inner), f"trimmed_mean({share})")


def by_parameter(rows: Rows, function: Callable[[Vector], Vector]) -> Float64[Floats, " parameter"]:
    """A function of every parameter's values in increasing order, [parameter, client] -> [parameter]."""
    out = np.empty(len(rows[0]))
    for at in range(0, len(out), _SORTED):
        part = slice(at, at + _SORTED)
        values = np.stack([row[part] for row in rows], axis=1)  # numpy sorts neighbours ten times as fast
        values.sort(axis=1)
        out[part] = function(values)
    return out


# --- distances ----------------------------------------------------------------------------------------------


def geometric_median(*, weighted: bool = False, smoothing: float = 1e-6, iterations: int = 1000) -> Aggregator:
    """RFA: the point whose summed distance to all updates is least, by smoothed Weiszfeld iterations.

    Withstands fewer attackers than half of the cohort (of the weight, if weighted).

    Source: Pillutla, Kakade, Harchaoui 2022, "Robust aggregation for federated learning", algorithm 2. There
    every iteration is a secure sum over the network; here all distances come from the inner products of the
    updates, computed once, so that iterations cost nothing and run until they stand still.

    Args:
        weighted: by what clients say they count. An attacker may say anything, so by default all count the same.
        smoothing: distances below this count as this much (the paper's ν).
        iterations: at most so many.

    Example:
        >>> geometric_median().label
        'geometric_median()'
    """
    check_number("smoothing", smoothing, above=True)
    check_whole("iterations", iterations, least=1)

    def rule(c: Collected) -> Vector:
        inner = gram(c.rows)
        weights = c.weights if weighted else np.ones(len(c.rows))
        lengths = np.sqrt(inner.diagonal())
        near = lengths <= np.median(lengths)  # begins among the honest, however long the others are
        shares = near / near.sum()
        for _ in range(iterations):
            before, away = shares, lengths**2 - 2 * inner @ shares + shares @ inner @ shares
            shares = weights / np.maximum(smoothing, np.sqrt(np.maximum(away, 0)))
            shares = shares / shares.sum()
            if np.abs(shares - before) @ lengths <= 1e-12 * (shares @ lengths):
                break
        return combined(c.rows, shares)

    told = {"weighted": (weighted, False), "smoothing": (smoothing, 1e-6), "iterations": (iterations, 1000)}
    return collect(rule, f"geometric_median({_unusual(told)})")


def krum(attackers: int) -> Aggregator:
    """The one update that is nearest to its neighbours. Ignores weights.

    Each update's score is the sum of its squared distances to the clients − attackers − 2 updates nearest to it; the
    least one wins. Needs at least 2 · attackers + 3 updates.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine learning with adversaries", section 4.
    Cost: the inner products of all pairs.

    Args:
        attackers: how many there may be in a cohort.

    Example:
        >>> krum(2).label
        'krum(attackers=2)'
    """
    check_whole("attackers", attackers, least=0)
    label = f"krum(attackers={attackers})"

    def rule(c: Collected) -> Vector:
        borne = _borne(c, label, attackers, each=2)
        return c.rows[int(ranked(squared_distances(c.rows), borne)[0])].astype(np.float64)

    return collect(rule, label, least=2 * attackers + 3)


def multi_krum(attackers: int, *, keep: int | None = None) -> Aggregator:
    """The mean of the ``keep`` updates of the best Krum scores. Ignores weights.

    Source: Blanchard et al. 2017, section 4 ("Multi-Krum"); by default all but ``attackers``, as in its experiments.
    Needs at least 2 · attackers + 3 updates. Cost: the inner products of all pairs.

    Args:
        attackers: how many there may be in a cohort.
        keep: how many updates to average.

    Example:
        >>> multi_krum(2, keep=5).label
        'multi_krum(attackers=2, keep=5)'
    """
    check_whole("attackers", attackers, least=0)
    if keep is not None:
        check_whole("keep", keep, least=1)
    label = f"multi_krum(attackers={attackers}{'' if keep is None else f', keep={keep}'})"

    def rule(c: Collected) -> Vector:
        borne = _borne(c, label, attackers, each=2)
        order = ranked(squared_distances(c.rows), borne)
        return average(c.rows, order[: len(c.rows) - borne if keep is None else keep])

    return collect(rule, label, least=2 * attackers + 3)


def bulyan(attackers: int) -> Aggregator:
    """Krum picks clients − 2 · attackers updates one after another; then of every parameter the mean of those picked
    values that are nearest to their median. Ignores weights.

    Against attackers who hide a large change of one parameter in a small distance. Needs at least
    4 · attackers + 3 updates.

    Source: El Mhamdi, Guerraoui, Rouault 2018, "The hidden vulnerability of distributed learning in Byzantium", section
    4. Where fewer are left to pick from than Krum needs, an update's nearest one is its score.
    Cost: the inner products of all pairs, and one sort of the values of each parameter.

    Args:
        attackers: how many there may be in a cohort.

    Example:
        >>> bulyan(1).label
        'bulyan(attackers=1)'
    """
    check_whole("attackers", attackers, least=0)
    label = f"bulyan(attackers={attackers})"

    def rule(c: Collected) -> Vector:
        borne = _borne(c, label, attackers, each=4)
        away, left, picked = squared_distances(c.rows), list(range(len(c.rows))), list[int]()
        while len(picked) < len(c.rows) - 2 * borne:
            picked.append(left.pop(int(ranked(away[np.ix_(left, left)], borne)[0])))
        return by_parameter([c.rows[i] for i in sorted(picked)], lambda v: central(v, 2 * borne))

    return collect(rule, label, least=4 * attackers + 3)


def central(values: Vector, fewer: int) -> Float64[Floats, " parameter"]:
    """Of sorted values [parameter, client] the mean of all but the ``fewer`` that are farthest from the median."""
    clients = values.shape[1]
    middle = values[:, (clients - 1) // 2 : clients // 2 + 1].mean(axis=1, dtype=np.float64)[:, None]
    # Those nearest to the median lie side by side: of all windows, the one that reaches least far.
    reach = np.maximum(middle - values[:, : fewer + 1], values[:, clients - fewer - 1 :] - middle)
    window = reach.argmin(axis=1)[:, None] + np.arange(clients - fewer)
    found: Floats = np.take_along_axis(values, window, axis=1).mean(axis=1, dtype=np.float64)
    return found


def centred_clipping(radius: float, *, iterations: int = 1) -> Aggregator:
    """The previous aggregate, moved by the mean of what each update differs from it, clipped to ``radius``.

    The only rule here with a memory: attacks that hide in the spread of one round would have to add up over rounds,
    and do not. Ignores weights. Keeps the last aggregate as "centre" [parameter].

    Source: Karimireddy, He, Jaggi 2021, "Learning from history for Byzantine robust optimization", section 4.2,
    which bounds the error for clients that send momentum; ``iterations=1`` is enough there.

    Args:
        radius: about the norm by which honest updates differ from each other (the paper's τ).
        iterations: how often to move the centre in each round.

    Example:
        >>> centred_clipping(1.0).label
        'centred_clipping(1.0)'
    """
    check_number("radius", radius, above=True)
    check_whole("iterations", iterations, least=1)

    def rule(c: Collected) -> Vector:
        centre: Vector = c.state["centre"]
        for _ in range(iterations):
            shares = np.minimum(1, radius / np.maximum(distances(c.rows, centre), 1e-300)) / len(c.rows)
            centre = (1 - shares.sum()) * centre + combined(c.rows, shares)
        return centre

    return collect(
        rule, f"centred_clipping({radius}{f', iterations={iterations}' if iterations > 1 else ''})",
        init=lambda layout: {"centre": np.zeros(layout.size)}, keep=lambda c, vector: {"centre": vector.copy()},
    )  # fmt: skip


def fltrust(trusted: int) -> Aggregator:
    """Updates count by how far they point the way of one that the server made itself. Ignores weights.

    The server holds a small clean data set: it is the client at position ``trusted``, which has to be in every cohort
    (``cohort=always([trusted], uniform(20))``). Each other update is scaled to the length of the trusted one and counts
    by the cosine between them, or not at all if that is negative; the trusted one only measures. If nobody counts,
    the model stays.

    Withstands any number of attackers, as long as the trusted examples are like the honest clients'.

    Source: Cao, Fang, Liu, Gong 2021, "FLTrust: Byzantine-robust federated learning via trust bootstrapping",
    algorithm 2.

    Args:
        trusted: the position of the server's own client in the population.

    Example:
        >>> fltrust(trusted=0).label
        'fltrust(trusted=0)'
    """
    check_whole("trusted", trusted, least=0)

    def rule(c: Collected) -> Vector:
        if trusted not in c.clients:
            raise ConfigurationError(
                f"fltrust(trusted={trusted}) needs the update of client {trusted}, which is not in round "
                f"{c.context.round}. Write cohort=foedus.always([{trusted}], ...), and keep it from dropping out"
            )
        own = int(np.searchsorted(c.clients, trusted))
        inner = gram(c.rows, np.zeros(len(c.rows[0])))
        norms = np.maximum(np.sqrt(inner.diagonal()), 1e-150)
        trust = np.maximum(inner[own] / (norms * norms[own]), 0)
        trust[own] = 0
        return combined(c.rows, trust / max(trust.sum(), 1e-300) * norms[own] / norms)

    return collect(rule, f"fltrust(trusted={trusted})")


def dnc(attackers: int, *, iterations: int = 1, dimensions: int = 10_000, factor: float = 1.0) -> Aggregator:
    """Divide and conquer: the mean without the updates that stand out along the direction of largest spread.

    In each iteration some parameters are drawn by lot, the updates are centred there, and the ``factor · attackers``
    that lie farthest along the first singular vector are suspected. Only those never suspected are averaged; if
    there are none, those suspected least often. Ignores weights.

    Source: Shejwalkar, Houmansadr 2021, "Manipulating the Byzantine", algorithm 2. Cost: one decomposition of
    [client, client] and 8 · clients · dimensions bytes.

    Args:
        attackers: how many there may be in a cohort.
        iterations: how often to draw parameters.
        dimensions: how many to draw.
        factor: how many to suspect for each attacker (the paper's c).

    Example:
        >>> dnc(4).label
        'dnc(attackers=4)'
    """
    for name, value, least in (
        ("attackers", attackers, 0),
        ("iterations", iterations, 1),
        ("dimensions", dimensions, 1),
    ):
        check_whole(name, value, least=least)
    check_number("factor", factor, above=True)
    told: dict[str, tuple[object, object]] = {
        "attackers": (attackers, None), "iterations": (iterations, 1), "dimensions": (dimensions, 10_000),
        "factor": (factor, 1.0),
    }  # fmt: skip
    label = f"dnc({_unusual(told)})"

    def rule(c: Collected) -> Vector:
        suspects = _borne(c, label, int(factor * attackers + 1e-9), each=1, more=1)
        lot, size = generator(c.context.seed, c.context.round, "dnc"), len(c.rows[0])
        often = np.zeros(len(c.rows), np.int64)
        for _ in range(iterations):
            drawn = np.sort(lot.choice(size, min(dimensions, size), replace=False))
            outliers = spectral(np.stack([row[drawn] for row in c.rows]).astype(np.float64))
            often[np.argsort(-outliers, kind="stable")[:suspects]] += 1
        return average(c.rows, np.flatnonzero(often == often.min()))

    return collect(rule, label)


def spectral(matrix: Floats) -> Float64[Floats, " client"]:
    """Squared projections of centred rows [client, parameter] onto their first right singular vector, [client]."""
    centred = matrix - matrix.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)  # left singular vectors: no [parameter, parameter]
    found: Floats = values[-1] * vectors[:, -1] ** 2
    return found


# --- what the rules share -----------------------------------------------------------------------------------


def blocks(rows: Rows) -> Iterator[tuple[slice, Floats]]:
    """Some parameters of all rows at a time, float64 [client, parameter]."""
    step = max(_BLOCK // len(rows), 1)
    for at in range(0, len(rows[0]), step):
        part = slice(at, at + step)
        yield part, np.stack([row[part] for row in rows], dtype=np.float64)


def gram(rows: Rows, origin: Vector | None = None) -> Float64[Floats, "client client"]:
    """Inner products of all rows, taken from ``origin`` [parameter], by default the row of median norm.

    The origin matters for rounding only: distances between honest rows must not drown in an attacker's length,
    and a row of median norm is no longer than an honest one.
    """
    if origin is None:
        norms = distances(rows, np.zeros(len(rows[0])))
        origin = rows[int(np.argsort(norms, kind="stable")[len(norms) // 2])]
    total = np.zeros((len(rows), len(rows)))
    for part, block in blocks(rows):
        block -= origin[part]
        total += block @ block.T
    return total


def squared_distances(rows: Rows) -> Float64[Floats, "client client"]:
    """Between all pairs of rows."""
    inner = gram(rows)
    lengths = inner.diagonal()
    away: Floats = np.maximum(lengths[:, None] + lengths - 2 * inner, 0)
    np.fill_diagonal(away, 0)
    return away


def distances(rows: Rows, point: Vector) -> Float64[Floats, " client"]:
    """From every row to a point [parameter]."""
    total = np.zeros(len(rows))
    for part, block in blocks(rows):
        block -= point[part]
        total += np.einsum("cp,cp->c", block, block)
    found: Floats = np.sqrt(total)
    return found


def combined(rows: Rows, shares: Floats) -> Float64[Floats, " parameter"]:
    """Σ share · row, for shares [client]."""
    out = np.empty(len(rows[0]))
    for part, block in blocks(rows):
        out[part] = shares @ block
    return out


def average(rows: Rows, chosen: NDArray[np.integer]) -> Float64[Floats, " parameter"]:
    """The mean of the chosen rows (positions among the rows)."""
    kept = np.sort(chosen)
    return combined([rows[i] for i in kept], np.full(len(kept), 1 / len(kept)))


def ranked(away: Floats, attackers: int) -> Int64[NDArray[np.int64], " client"]:
    """Rows in the order of Krum's scores: of squared distances [client, client], the sum of the
    clients − attackers − 2 least. Where few are left, two that are nearest to each other have the same score; then
    the sum of all distances decides, not the numbers of the clients."""
    near = max(len(away) - attackers - 2, 1)
    scores = np.sort(away, axis=1)[:, 1 : 1 + near].sum(axis=1)  # the first is its own, 0
    return np.lexsort((away.sum(axis=1), scores))


def _unusual(told: Mapping[str, tuple[object, object]]) -> str:
    """Arguments as they are written, those at their default left out: name -> (value, default)."""
    return ", ".join(f"{name}={value}" for name, (value, default) in told.items() if value != default)


def _borne(c: Collected, label: str, attackers: int, *, each: int, more: int = 3) -> int:
    """How many attackers a rule counts on: as many as it was told.

    Where too few updates are left for that, because some were refused, it is as many as it can bear: those that were
    refused count as attackers who are out already. Otherwise attackers could stop a run by NaN.

    Raises:
        ConfigurationError: there are fewer than ``each · attackers + more`` updates, and too few were refused to
            make up for it.
    """
    have = len(c.rows)
    fit = (have - more) // each
    if have >= more and fit >= attackers - c.context.refused:
        return min(attackers, fit)
    hint = f"write attackers={fit}, or " if fit >= 0 else ""
    raise ConfigurationError(
        f"{label} needs at least {each * attackers + more} updates ({each} · {attackers} + {more}), and round "
        f"{c.context.round} brought {have}: {hint}a larger cohort"
    )

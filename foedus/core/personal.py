"""Models of each client's own: a function ``Method -> Method``, chosen by one argument of the algorithm.

    fedavg(local, personal=fine_tune(epochs=1))

After it, evaluation by client (``Evaluation(clients=True)``) has the figures of every client's own model beside those
of the global one: mean, spread and worst decile. Those that only add something (:func:`fine_tune`,
:func:`local_parts`, :func:`fedbn`, :func:`ditto`) wrap any method, such as SCAFFOLD's; those that say themselves what
clients do (:func:`fedrep`, :func:`pfedme`, :func:`ifca`) go with federated averaging and refuse the rest.

Not here: how the figures are put together (``rounds/evaluate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, mean
from foedus.core.checks import check_number, check_whole
from foedus.core.client import Client, LocalSGD, LocalTraining, proximal
from foedus.core.method import (
    Contribution,
    Gathered,
    Local,
    Measure,
    Method,
    Own,
    Personal,
    Request,
    Train,
    Trained,
    Visit,
    plain,
    steered,
)
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

OWN = "own."  # what these wrappers keep on a client, beside what the wrapped method keeps


# --- evaluation only ----------------------------------------------------------------------------------------


def fine_tune(client: Client | None = None, *, epochs: int = 1) -> Personal:
    """Each client trains a copy of the global model on its own examples before it is evaluated; the federation itself
    is as without it, and nothing more is sent (Wang et al. 2019, "Federated evaluation of on-device personalization").

    Args:
        client: how it trains; by default as the algorithm says, for so many ``epochs``.
        epochs: passes over the client's examples, where ``client`` is not given.

    Example:
        >>> from foedus.core.method import averaging
        >>> fine_tune(epochs=2)(averaging()).label
        'fine_tune(plain(), epochs=2)'
    """
    check_whole("epochs", epochs, least=1)
    _check_client("fine_tune()", client)
    told = f"epochs={epochs}" if client is None else client.label

    def personal(visit: Visit) -> Own:
        trained = yield Train(spec=client or _lasting(visit.spec, epochs))
        return trained.vector, trained.buffers

    return lambda method: method._replace(personal=personal, label=f"fine_tune({method.label}, {told})")


# --- parts that stay at home --------------------------------------------------------------------------------


def local_parts(*parts: str) -> Personal:
    """Parts of the model never leave the client: FedPer (Arivazhagan et al. 2019, "Federated learning with
    personalization layers", algorithm 1).

    Each client trains the whole model and keeps these parts for itself; what travels, both ways, is the rest, as a
    shorter vector. The global model's own copy of the parts stays as it was at first, so that only
    clients' own models are worth evaluating. Wraps any method; vectors that it sends beside the update (control
    variates) hold zeros for the parts.

    Args:
        parts: names of parameters or modules: ``"head"`` means ``head``, ``head.weight``, ``head.0.bias`` and so on;
            their buffers stay, too.

    Example:
        >>> from foedus.core.method import averaging
        >>> local_parts("head")(averaging()).label
        "local_parts(plain(), 'head')"
    """
    if not parts:
        raise ConfigurationError('local_parts() needs names of layers, e.g. local_parts("head")')
    _check_names("local_parts", parts)
    told = ", ".join(map(repr, parts))
    choose = _named(parts)
    return lambda method: _staying(method, choose, f"local_parts({method.label}, {told})")


def fedbn() -> Personal:
    """Batch normalisation stays with the client, its statistics as well as its scales and shifts: FedBN (Li et al.
    2021, "FedBN: Federated learning on non-IID features via local batch normalization", algorithm 1).

    Layers are recognised by their ``running_mean``. Other normalisation has no statistics:
    ``local_parts("norm1", "norm2")`` keeps it at home by name. Wraps any method.

    Example:
        >>> from foedus.core.method import averaging
        >>> fedbn()(averaging()).label
        'fedbn(plain())'
    """
    return lambda method: _staying(method, _normalising, f"fedbn({method.label})")


def fedrep(*head: str, epochs: int = 1) -> Personal:
    """Local heads trained first, then the common body: FedRep (Collins et al. 2021, "Exploiting shared
    representations for personalized federated learning", algorithm 1).

    A client trains its head for ``epochs`` while the body stands still, and then the body, as the algorithm's local
    training says, while the head stands still. Only the body travels. Goes with federated averaging.

    Args:
        head: names of the head's parameters or modules, as for :func:`local_parts`.
        epochs: of the head's training.

    Example:
        >>> from foedus.core.method import averaging
        >>> fedrep("head", epochs=5)(averaging()).label
        "fedrep('head', epochs=5)"
    """
    if not head:
        raise ConfigurationError('fedrep() needs the names of the head\'s layers, e.g. fedrep("head")')
    _check_names("fedrep", head)
    check_whole("epochs", epochs, least=1)
    label = f"fedrep({', '.join(map(repr, head))}, epochs={epochs})"
    choose = _named(head)

    def local(visit: Visit) -> Local:
        masks = _masks(choose, visit.layout, visit.buffer_layout)
        first = yield Train(mask=masks.home, spec=_lasting(visit.spec, epochs))
        trained = yield Train(start=first.vector, buffers=first.buffers, mask=masks.common)
        brought = Contribution.of(trained, visit)
        return brought._replace(steps=first.steps + trained.steps)

    def wrap(method: Method) -> Method:
        return _staying(_alone(method, label)._replace(local=local, fits=steered), choose, label)

    return wrap


Choose = Callable[[Layout, Layout], frozenset[str]]


class _Masks(NamedTuple):
    """1 for what stays and for what is common, [parameter]; and which parameters and buffers stay, int64."""

    home: Vector
    common: Vector
    at: NDArray[np.int64]
    buffers_at: NDArray[np.int64]


@lru_cache(maxsize=16)  # one object for all clients: what is masked alike is trained together
def _masks(choose: Choose, layout: Layout, buffer_layout: Layout) -> _Masks:
    names = choose(layout, buffer_layout)
    at = layout.positions(names)
    home = np.zeros(layout.size, layout.dtype)
    home[at] = 1
    return _Masks(home, 1 - home, at, buffer_layout.positions(names))


def _staying(method: Method, choose: Choose, label: str) -> Method:
    """A method in which the chosen parts of the model stay with each client.

    The wrapped method sees the client's own parts in what it received; they are kept as its last training left them.
    """

    def local(visit: Visit) -> Local:
        masks = _masks(choose, visit.layout, visit.buffer_layout)
        own = _at_home(visit, masks)
        trained: list[Trained] = []
        inner = _rewritten(method.local(own), lambda request: _from(request, own, masks), trained)
        brought: Contribution = yield from inner
        if brought.update is None or not trained:
            return brought._replace(kept=visit.kept)  # it is as though the client had not taken part
        after = brought.buffers if brought.buffers is not None else own.buffers
        kept = {f"{OWN}parts": trained[-1].vector[masks.at], f"{OWN}buffers": after[masks.buffers_at]}
        sides = {n: v * masks.common if v.shape == masks.common.shape else v for n, v in brought.sides.items()}
        return brought._replace(update=brought.update * masks.common, sides=sides, kept={**brought.kept, **kept})

    def personal(visit: Visit) -> Own:
        masks = _masks(choose, visit.layout, visit.buffer_layout)
        own = _at_home(visit, masks)
        if method.personal is None:
            return own.received, own.buffers
        inner = _rewritten(method.personal(own), lambda request: _from(request, own, masks), [])
        found: tuple[Vector, Vector] = yield from inner
        return found

    return method._replace(local=local, personal=personal, home=choose, label=label)


def _at_home(visit: Visit, masks: _Masks) -> Visit:
    """The visit with the client's own parts in what it received."""
    if f"{OWN}parts" not in visit.kept:
        return visit
    received, buffers = visit.received.copy(), visit.buffers.copy()
    received[masks.at] = visit.kept[f"{OWN}parts"]
    buffers[masks.buffers_at] = visit.kept[f"{OWN}buffers"]
    return visit._replace(received=received, buffers=buffers)


def _from(request: Request, own: Visit, masks: _Masks) -> Request:
    """A request that begins with the client's own parts, and shifts only the gradients of the common ones."""
    if not isinstance(request, Train | Measure):
        return request
    buffers = own.buffers if request.buffers is None else request.buffers
    if isinstance(request, Measure):
        return request._replace(buffers=buffers)
    start, anchor = (own.received if v is None else v for v in (request.start, request.anchor))
    shift = None if request.shift is None else request.shift * masks.common
    return request._replace(start=start, anchor=anchor, shift=shift, buffers=buffers)


def _rewritten(
    inner: Generator[Request, Any, Any], change: Callable[[Request], Request], trained: list[Trained]
) -> Generator[Request, Any, Any]:
    """The same generator with its requests changed; what it trained is appended."""
    answer: Any = None
    while True:
        try:
            request = inner.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield change(request)
        if isinstance(answer, Trained):
            trained.append(answer)


def _named(parts: tuple[str, ...]) -> Choose:
    def choose(layout: Layout, buffer_layout: Layout) -> frozenset[str]:
        there = (*layout.names, *buffer_layout.names)
        for part in parts:
            if not any(_within(name, part) for name in layout.names):
                raise ConfigurationError(
                    f"no parameter is named {part!r}, nor lies in a module of that name; there are: "
                    f"{', '.join(layout.names)}"
                )
        return frozenset(name for name in there if any(_within(name, part) for part in parts))

    return choose


def _check_names(function: str, names: tuple[Any, ...]) -> None:
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ConfigurationError(
            f"{function}() takes names of layers, and was given something of type {type(wrong[0]).__name__}: write "
            f'personal=foedus.{function}("head") with your layer\'s name'
        )


def _check_client(call: str, client: Any) -> None:
    if client is not None and not isinstance(client, LocalSGD | LocalTraining):
        raise ConfigurationError(
            f"{call} takes client=local_sgd(...), or nothing, and was given something of type {type(client).__name__}: "
            f"write personal=foedus.{call}"
        )


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _normalising(layout: Layout, buffer_layout: Layout) -> frozenset[str]:
    """Everything that lies in a module beside a ``running_mean``."""
    modules = {n.rpartition(".")[0] for n in buffer_layout.names if n.rpartition(".")[2] == "running_mean"}
    if not modules:
        raise ConfigurationError(
            "fedbn() keeps batch normalisation at home, and the model has none (no buffer is named running_mean). "
            'Other layers are kept by name: local_parts("norm")'
        )
    there = (*layout.names, *buffer_layout.names)
    return frozenset(name for name in there if name.rpartition(".")[0] in modules)


# --- whole models of their own ------------------------------------------------------------------------------


def ditto(lam: float, client: LocalSGD | None = None) -> Personal:
    """A second model for every client, pulled towards the global one: Ditto (Li et al. 2021, "Ditto: Fair and robust
    federated learning through personalization", algorithm 1).

    After its part in the federation, a client trains its own ``vᵢ`` (at first the model received) on
    ``F(v) + λ/2 ‖v − received‖²``. Twice the computation; nothing more is sent. Wraps any method.

    Args:
        lam: λ; 0 gives local models that share nothing, a large one the global model.
        client: how ``vᵢ`` is trained; by default as the algorithm says.

    Example:
        >>> from foedus.core.method import averaging
        >>> ditto(0.1)(averaging()).label
        'ditto(plain(), lam=0.1)'
    """
    if isinstance(lam, Method):
        raise ConfigurationError("ditto was given uncalled: write personal=foedus.ditto(0.1)")
    check_number("lam", lam)
    _check_client("ditto(0.1)", client)
    told = f"lam={lam}" if client is None else f"lam={lam}, {client.label}"

    def wrap(method: Method) -> Method:
        def local(visit: Visit) -> Local:
            brought = yield from method.local(visit)
            start, buffers = _own(visit)
            spec = _pulled(client or visit.spec, lam)
            own = yield Train(start=start, anchor=visit.received, spec=spec, buffers=buffers)
            if not np.isfinite(own.vector).all():
                own = own._replace(vector=start, buffers=buffers)
            return brought._replace(kept=dict(brought.kept) | _kept(own))

        def fits(spec: Client) -> None:
            method.fits(spec)
            _pulled(client or spec, lam)

        return method._replace(local=local, personal=_as_kept, label=f"ditto({method.label}, {told})", fits=fits)

    return wrap


def pfedme(lam: float, *, rounds: int, steps: int, lr: float) -> Personal:
    """Personal models as proximal points of the global one: pFedMe (Dinh et al. 2020, "Personalized federated
    learning with Moreau envelopes", algorithm 1).

    In each of ``rounds`` local rounds a client finds ``θ ≈ argmin F(θ) + λ/2 ‖θ − w‖²`` by ``steps`` of the algorithm's
    local training from where it was, and moves ``w ← w − lr · λ (w − θ)``; it sends ``w``. The paper's β is
    ``server=sgd(lr=β)``. It takes one batch for all steps of a local round, here each has its own. Goes with
    federated averaging.

    Args:
        lam: λ.
        rounds: local rounds, R in the paper.
        steps: of local training in each, K in the paper.
        lr: η, of the local copy of the global model; ``lr · λ`` should be below 1.

    Example:
        >>> from foedus.core.method import averaging
        >>> pfedme(15.0, rounds=3, steps=5, lr=0.01)(averaging()).label
        'pfedme(lam=15.0, rounds=3, steps=5, lr=0.01)'
    """
    check_number("lam", lam, above=True)
    check_number("lr", lr, above=True)
    check_whole("rounds", rounds, least=1)
    check_whole("steps", steps, least=1)
    label = f"pfedme(lam={lam}, rounds={rounds}, steps={steps}, lr={lr})"

    def local(visit: Visit) -> Local:
        spec = _pulled(_stepping(visit.spec, steps), lam)
        w, own, losses = visit.received, Trained(visit.received, visit.buffers, 0, 0.0), []
        for _ in range(rounds):
            own = yield Train(start=own.vector, anchor=w, spec=spec, buffers=own.buffers)
            w = w - lr * lam * (w - own.vector)
            losses.append(own.loss)
        brought = Contribution(w - visit.received, buffers=own.buffers, loss=float(np.mean(losses)))
        return brought._replace(steps=rounds * own.steps, kept=_kept(own))

    def fits(spec: Client) -> None:
        _pulled(_stepping(spec, steps), lam)

    def wrap(method: Method) -> Method:
        return _alone(method, label)._replace(local=local, personal=_as_kept, label=label, fits=fits)

    return wrap


def ifca(clusters: int, *, spread: float = 1.0, seed: int = 0, aggregator: Aggregator | None = None) -> Personal:
    """As many global models as there are kinds of clients: IFCA (Ghosh et al. 2020, "An efficient framework for
    clustered federated learning", algorithm 1, model averaging).

    A client is sent all models, trains the one with the least loss on its examples, and sends its update to that
    one's mean. The global model is a copy of the one that most clients of the last round chose: leave the server
    optimiser as it is. Clusters form only if the first models differ enough for clients to choose differently. Goes
    with federated averaging; buffers stay as they were at first.

    Args:
        clusters: how many models.
        spread: how much the first models differ from the model's own first weights: normal noise of so many times
            their root mean square (of 1, where these are all 0). The first model is without noise.
        seed: of that noise.
        aggregator: of each cluster; by default the mean weighted by examples.

    Example:
        >>> from foedus.core.method import averaging
        >>> ifca(3)(averaging()).label
        'ifca(3, spread=1.0, seed=0)'
    """
    check_whole("clusters", clusters, least=1)
    check_number("spread", spread)
    rule = aggregator or mean()
    label = f"ifca({clusters}, spread={spread}, seed={seed}{'' if aggregator is None else ', ' + rule.label})"
    names = [f"model{j}" for j in range(clusters)]

    def init(vector: Vector, population: int) -> State:
        scale = float(np.sqrt(np.mean(np.square(vector, dtype=np.float64)))) or 1.0
        noise = np.random.Generator(np.random.Philox(seed)).normal(size=(clusters, len(vector)))
        noise[0] = 0
        return {n: (vector + spread * scale * own).astype(vector.dtype) for n, own in zip(names, noise, strict=True)}

    def choice(visit: Visit) -> Generator[Request, Any, int]:
        losses = np.zeros(clusters)
        for j, name in enumerate(names):
            losses[j] = (yield Measure(visit.down[name]))["loss"]
        return int(np.argmin(np.nan_to_num(losses, nan=np.inf)))

    def local(visit: Visit) -> Local:
        mine = yield from choice(visit)
        trained = yield Train(start=visit.down[names[mine]], anchor=visit.down[names[mine]])
        members = np.zeros(clusters)
        members[mine] = 1
        sides = {names[mine]: trained.vector - visit.down[names[mine]], "members": members}
        return Contribution.of(trained, visit)._replace(update=None, sides=sides)

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        state = dict(gathered.state)
        for name in names:
            if name in gathered.sides:
                state[name] = (state[name] + gathered.sides[name]).astype(state[name].dtype)
        if "members" not in gathered.sides:
            return None, gathered.state
        return state[names[int(np.argmax(gathered.sides["members"]))]] - gathered.vector, state

    def personal(visit: Visit) -> Own:
        mine = yield from choice(visit)
        return visit.down[names[mine]], visit.buffers

    sides = dict.fromkeys(names, rule) | {"members": mean(weighted=False)}

    def wrap(method: Method) -> Method:
        _alone(method, label)
        own = Method(local, label, init, lambda state: state, sides, finish, personal)
        return own._replace(updates=frozenset(names), looks=True)

    return wrap


# --- what they share ----------------------------------------------------------------------------------------


def _alone(method: Method, label: str) -> Method:
    """The method, if it is plain federated averaging."""
    if method.local is not plain:
        raise ConfigurationError(
            f"{label} says itself what clients do, and so does {method.label}: the two cannot be one algorithm. Write "
            "fedavg(..., personal=...), or choose fine_tune(), local_parts(), fedbn() or ditto(), which go with any "
            "method"
        )
    return method


def _own(visit: Visit) -> tuple[Vector, Vector]:
    """The client's own weights and buffers, or those received if it has none yet."""
    kept = visit.kept
    return kept.get(f"{OWN}vector", visit.received), kept.get(f"{OWN}buffers", visit.buffers)


def _kept(own: Trained) -> State:
    return {f"{OWN}vector": own.vector, f"{OWN}buffers": own.buffers}


def _as_kept(visit: Visit) -> Own:
    """The model that the client keeps, for evaluation."""
    yield from ()  # a generator that asks for nothing
    return _own(visit)


# Specs derived from the algorithm's. They compare by value, so that all clients of a round are trained together.


def _lasting(spec: Client, epochs: int) -> Client:
    return replace(spec, epochs=epochs, steps=None)


def _stepping(spec: Client, steps: int) -> Client:
    return replace(spec, epochs=None, steps=steps)


def _pulled(spec: Client, lam: float) -> Client:
    if not isinstance(spec, LocalSGD):
        raise ConfigurationError(
            "a model of the client's own is pulled by a term in its objective, which needs local_sgd(); not "
            f"{spec.label}"
        )
    if spec.penalty is not None:
        raise ConfigurationError(
            f"local training has the penalty {spec.penalty.label} already, and a model of the client's own has "
            f"λ = {lam:g} instead: leave the penalty out, or give ditto() a client=local_sgd(...) without one"
        )
    return replace(spec, penalty=proximal(lam))

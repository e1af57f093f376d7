"""Methods: what an algorithm does beyond "train, send the update, average".

Most of federated learning's algorithms differ in four places: what a client does between receiving the model and
sending its update, what it keeps for its next visit, what travels beside model and update, and what the server
makes of it. A :class:`Method` is these four as pure functions. The client's part is a *generator* that yields
what it wants done (:class:`Train`, :class:`Measure`, :class:`Consult`) and is given the results, so that it reads like
the paper's algorithm; whoever drives it decides how: the simulator runs the requests of a whole cohort as one batched
computation, a device runs its own.

Not here: how requests are carried out (``backends``, ``sim``), the methods themselves (``core/drift.py``, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator
from foedus.core.client import Client, LocalTraining
from foedus.core.examples import Examples
from foedus.core.values import NOTHING, State
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

Vectors = Mapping[str, NDArray[Any]]


class Visit(NamedTuple):
    """What a client has at hand in a round.

    Attributes:
        received: the global model, [parameter].
        buffers: the global model's buffers, or the client's own if it keeps them, [buffer].
        down: what came beside the model (see ``Method.down``).
        kept: what the client kept at the end of its last visit; empty at its first.
        client: position in the population.
        round: counted from 1.
        seed: the run's.
        examples: how many training examples it has.
        spec: the algorithm's local training; ``spec.rate(round)`` is its learning rate.
        layout: where the arrays lie in the vector.
        buffer_layout: where they lie in the buffers.
    """

    received: Vector
    buffers: Vector
    down: Vectors
    kept: Vectors
    client: int
    round: int
    seed: int
    examples: int
    spec: Client
    layout: Layout
    buffer_layout: Layout = Layout((), (), ())

    @property
    def rate(self) -> float:
        """The learning rate of local training in this round."""
        return self.spec.rate(self.round)


class Train(NamedTuple):
    """A request: local training on the client's own examples. Its answer is :class:`Trained`.

    Attributes:
        start: weights to begin from, [parameter]; ``None``: the received ones.
        anchor: what penalties pull towards; ``None``: the received weights.
        shift: added to every gradient of the loss, [parameter].
        mask: 1 where parameters may move and 0 where not, [parameter]. Clients that are given the same object are
            trained together.
        bases: by name of a parameter, the columns [rows, rank] in whose span its matrix [rows, ...] may move;
            orthonormal. Clients that are given the same object are trained together.
        momenta: to begin with, [parameter], in place of zeros; the answer then has those at the end.
        spec: another way to train than the algorithm's; clients whose specs come to the same are trained together.
        buffers: to begin from, [buffer]; ``None``: ``visit.buffers``.

    Example: every gradient shifted by what the server sent:

        >>> def local(visit):
        ...     trained = yield Train(shift=visit.down["control"])
        ...     return Contribution.of(trained, visit)
    """

    start: Vector | None = None
    anchor: Vector | None = None
    shift: Vector | None = None
    mask: Vector | None = None
    spec: Client | None = None
    buffers: Vector | None = None
    bases: Vectors | None = None
    momenta: Vector | None = None


class Trained(NamedTuple):
    """What local training gave: weights [parameter], buffers [buffer], the number of steps, their mean loss; and the
    momenta at the end [parameter] if it was given some."""

    vector: Vector
    buffers: Vector
    steps: int
    loss: float
    momenta: Vector | None = None


class Measure(NamedTuple):
    """A request: mean loss and metrics of some weights on the client's own training examples (or, with
    ``held_out``, on those it holds out), in evaluation mode. Its answer is a dict by name.

    Attributes:
        vector: weights, [parameter].
        buffers: [buffer]; ``None``: ``visit.buffers``.

    Example: clients whom the model serves badly count for more:

        >>> def local(visit):
        ...     loss = (yield Measure(visit.received))["loss"]
        ...     return Contribution.of((yield Train()), visit)._replace(weight=visit.examples * loss)
    """

    vector: Vector
    buffers: Vector | None = None
    held_out: bool = False


class Consult(NamedTuple):
    """A request: a function of the client's own training examples. Its answer is what the function gives.

    For what is no training of the task's model by ``local_sgd``: counting, fitting in closed form, a solver of the
    method's own. It runs in numpy, one client after another, in every executor; limits on local steps (partial work in
    simulated worlds) do not reach it.

    Attributes:
        function: pure, ``Examples -> anything``; it may hold on to nothing and must not change the arrays.

    Example:
        >>> def local(visit):
        ...     centre = yield Consult(lambda examples: examples.inputs[0].mean(0))
        ...     return Contribution(centre - visit.received)
    """

    function: Callable[[Examples], Any]


class Contribution(NamedTuple):
    """What a client's visit ends with.

    Attributes:
        update: to be aggregated, [parameter]; ``None`` sends nothing.
        weight: in weighted means; ``None``: the number of examples.
        sides: further vectors to be aggregated, by channel; a client may leave channels out.
        kept: what the client keeps for its next visit; replaces what it kept before.
        buffers: [buffer] after the visit; ``None``: as they were.
        loss: the training loss to be reported.
        steps: how many local steps were made.
        report: figures of this client that go into the round's record (as mean over the cohort).

    Example:
        >>> sent = Contribution(np.array([3.0, 4.0]), weight=1.0, report={"length": 5.0})
        >>> sent._replace(update=None).update is None  # says something, and sends nothing
        True
    """

    update: Vector | None
    weight: float | None = None
    sides: Vectors = NOTHING
    kept: Vectors = NOTHING
    buffers: Vector | None = None
    loss: float = float("nan")
    steps: int = 0
    report: Mapping[str, float] = NOTHING  # type: ignore[assignment]

    @staticmethod
    def of(trained: Trained, visit: Visit) -> Contribution:
        """The plain one: trained weights − received weights."""
        return Contribution(
            trained.vector - visit.received, buffers=trained.buffers, loss=trained.loss, steps=trained.steps
        )


Request = Train | Measure | Consult
Local = Generator[Request, Any, Contribution]
Own = Generator[Request, Any, tuple[Vector, Vector]]  # ends with weights [parameter] and buffers [buffer]


class Gathered(NamedTuple):
    """What the server has after a round.

    Attributes:
        state: the method's.
        vector: the global model, [parameter].
        update: the aggregated update, [parameter]; ``None`` if no client sent one.
        sides: the aggregated vectors, by channel.
        senders: how many clients sent something.
        population: how many clients there are in all, without those known to have no examples in this round.
        round: counted from 1.
        rate: the learning rate of local training in this round.
        visited: how many clients took part, whether they sent an update or not; without those that were refused.
        layout: where the arrays lie in the vector.
    """

    state: State
    vector: Vector
    update: Vector | None
    sides: Vectors
    senders: int
    population: int
    round: int
    rate: float
    visited: int = 0
    layout: Layout | None = None


def plain(visit: Visit) -> Local:
    """Train and send the difference: the client's part of federated averaging."""
    return Contribution.of((yield Train()), visit)


def averaging() -> Method:
    """The method of federated averaging, for others to be built upon."""
    return Method(plain, "plain()")


def unchanged(gathered: Gathered) -> tuple[Vector | None, State]:
    """The server's part of federated averaging: the aggregated update as it is."""
    return gathered.update, gathered.state


class Method(NamedTuple):
    """An algorithm's own part on clients and server, as pure functions.

    * ``local(visit)``: the client's generator, see the module's docstring.
    * ``init(vector, population) -> state``: of the server, arrays by name, at the start.
    * ``down(state) -> vectors``: what every client is sent beside the model.
    * ``sides``: an aggregator for every channel that contributions use beside the update.
    * ``finish(gathered) -> (update, state)``: the update that the server optimiser is given (``None``: the model
      stays), and the new state.
    * ``home(layout, buffer_layout)``: if given, the names of the parameters and buffers that stay with the client:
      they are neither sent up nor down. What travels is a shorter vector, of the others; on the server these arrays
      stay as they were at first. ``local`` has to bring the client's own (see ``local_parts``).
    * ``personal(visit)``: if given, a generator that ends with the client's own weights [parameter] (and
      buffers), for evaluation client by client; its ``visit`` has what the client kept.

    * ``unscaled``: whether the server's sums are right only for updates as clients send them; such a method is refused
      where stale updates are scaled down.
    * ``fits(client)``: raises a ConfigurationError for local training that it cannot work with (:func:`steered`).
    * ``updates``: the channels of ``sides`` that carry updates of the model or of a part of it: the gate looks at them
      as at ``update``, and attackers replace them.

    * ``counts``: whether ``finish`` makes use of how many took part or sent something. Noise for privacy does not cover
      these numbers, so that such a method is refused under a budget of central noise.

    * ``lengths(layout)``: how long the vectors in the channels of ``sides`` are, where every client that sends
      anything sends them all. Masked sums between machines need to know it before anybody has trained.
    * ``silent``: whether clients send nothing at times, and ``finish`` makes use of how many did not.
    * ``looks``: whether what clients send, or whether they do, comes from looking at their data otherwise than by
      training on it: a loss that was measured, a solver of its own. The noise of ``dp_sgd`` is in training only.

    Example, whole: FedAvg whose clients also report how far they went:

        >>> import numpy as np
        >>> def local(visit):
        ...     trained = yield Train()
        ...     sent = Contribution.of(trained, visit)
        ...     return sent._replace(report={"distance": float(np.linalg.norm(sent.update))})
        >>> Method(local, "watched()").label
        'watched()'
    """

    local: Callable[[Visit], Local]
    label: str
    init: Callable[[Vector, int], State] = lambda vector, population: {}
    down: Callable[[State], Vectors] = lambda state: NOTHING
    sides: Mapping[str, Aggregator] = {}
    finish: Callable[[Gathered], tuple[Vector | None, State]] = unchanged
    personal: Callable[[Visit], Own] | None = None
    home: Callable[[Layout, Layout], frozenset[str]] | None = None
    unscaled: bool = False
    updates: frozenset[str] = frozenset()
    fits: Callable[[Client], None] = lambda client: None
    counts: bool = True
    lengths: Callable[[Layout], Mapping[str, int]] = lambda layout: {}
    silent: bool = False
    looks: bool = False


Personal = Callable[[Method], Method]  # gives clients models of their own beside (or instead of) the global one


class Travels(NamedTuple):
    """The part of a vector that travels: its layout, and where it lies in the whole, int64 [part]."""

    layout: Layout
    at: NDArray[np.int64]


def travelling(method: Method | None, layouts: tuple[Layout, Layout]) -> tuple[Travels | None, Travels | None]:
    """What travels of the parameters and of the buffers; ``None`` where it is all.

    Raises:
        ConfigurationError: no parameter is left that travels.
    """
    if method is None or method.home is None:
        return None, None
    home = method.home(*layouts)
    parameters, buffers = (_rest(layout, home) for layout in layouts)
    if parameters is not None and not parameters.layout.size:
        raise ConfigurationError(
            f"{method.label}: every parameter would stay with the clients, and nothing be learned together. There are: "
            f"{', '.join(layouts[0].names)}"
        )
    return parameters, buffers


def _rest(layout: Layout, home: frozenset[str]) -> Travels | None:
    stays = [name for name in layout.names if name in home]
    return Travels(layout.without(stays), layout.positions(layout.without(stays).names)) if stays else None


def steered(client: Client) -> None:
    """Refuse local training whose gradients nobody sees: for methods that shift or mask them.

    Raises:
        ConfigurationError: it is a loop of the user's own.
    """
    if isinstance(client, LocalTraining) and client.loop is not None:
        raise ConfigurationError(
            "this algorithm steers every gradient of local training, which a loop of your own hides. Give "
            "local_training(optimiser=lambda p: torch.optim.AdamW(p)) or local_sgd(...) instead"
        )


def zeros(like: Vector) -> Vector:
    """Zeros [parameter], of the same dtype."""
    return np.zeros_like(like)

"""Updates that are trained within a structure: a random mask, or matrices of low rank.

A stage such as ``random_mask`` or ``low_rank`` takes from a finished update what does not fit its form. Here clients
know the form before they begin, since it comes from the seed, the round and, if it is their own, from who they are;
they train within it, and what they send is all that they learned. For a mask that means to move only the entries that
it keeps; for H = A·B with A given, to train B: with orthonormal A, every gradient g of the matrix becomes A·(Aᵀ·g).

Source: Konečný et al. 2016, "Federated learning: strategies for improving communication efficiency" (arXiv 1610.05492),
section 2, "structured updates".

Not here: the forms themselves (``core/sparse.py``, ``core/layers.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from foedus.core.aggregate import Aggregator, mean
from foedus.core.client import Client, LocalSGD
from foedus.core.compose import Algorithm
from foedus.core.method import Contribution, Local, Method, Train, Visit
from foedus.core.server import ServerOptimiser, sgd
from foedus.core.stage import Stage, Subspace, chain
from foedus.core.values import Context
from foedus.errors import ConfigurationError
from foedus.tree import Layout

UPDATE = "update"  # the channel that the form is drawn for: the model's own


def structured(
    client: Client,
    form: Stage,
    *,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
) -> Algorithm:
    """Federated averaging whose clients train within a form and send only what it has room for (Konečný et al. 2016,
    section 2).

    A form that all clients of a round share adds up, and works where only the mean is seen. One of each client's own
    (``rand_k``) covers more of the model in a round, but every entry is moved by few: their mean is shorter by that
    share, for which ``server=sgd(lr=...)`` can make up.

    Args:
        client: ``local_sgd(...)``. The learning rate is that of the whole model's entries. A norm that gradients are
            clipped to is that of the whole gradient; decay and penalties act within the form, too.
        form: ``random_mask(share, unbiased=False)``, ``rand_k(share)``, ``low_rank(rank, unbiased=False)``, or one
            of these on some layers (``matrices(...)``, ``on_layers(...)``).
        aggregator: what stands behind the form, e.g. ``chain(rotate(), quantise(2), mean())``; by default the weighted
            mean.
        server: takes a step along the averaged update.

    Raises:
        ConfigurationError: ``client`` is training of the user's own, or ``form`` leaves nothing as it was.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.layers import low_rank
        >>> structured(local_sgd(lr=0.1), low_rank(4, unbiased=False)).aggregator.label
        'chain(low_rank(4, unbiased=False), mean())'
    """
    if not isinstance(client, LocalSGD):
        raise ConfigurationError(
            f"structured() trains by local_sgd(), whose gradients it confines to the form; "
            f"{getattr(client, 'label', repr(client))} takes steps of its own"
        )
    if not isinstance(form, Stage) or form.inside is None:
        raise ConfigurationError(
            f"structured() takes a form in which an update can stay as it is: random_mask(share, unbiased=False), "
            f"rand_k(share), low_rank(rank, unbiased=False), or matrices(...) or on_layers(...) of these; not "
            f"{getattr(form, 'label', repr(form))}"
        )
    inside = form.inside

    def local(visit: Visit) -> Local:
        own = _within(inside, visit.seed, visit.round, 0 if form.linear else visit.client, visit.layout)
        trained = yield Train(mask=own.mask, bases=own.bases or None)
        return Contribution.of(trained, visit)

    method = Method(local, f"structured({form.label})")
    return Algorithm(client=client, aggregator=chain(form, aggregator or mean()), server=server or sgd(), method=method)


@lru_cache(maxsize=64)
def _within(inside: Callable[[Context], Subspace], seed: int, round: int, client: int, layout: Layout) -> Subspace:
    """What updates look like: one object for all who train within the same form, who are trained together."""
    return inside(Context(seed, round, client, layout, layout.size, UPDATE))

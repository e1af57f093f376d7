"""Error feedback: what a lossy message left out is kept by the client and added to its next update.

Any compressor that leaves out less than all (‖C(x) − x‖² ≤ (1 − δ)·‖x‖², δ > 0) then converges as if nothing had
been left
out: top-k, rand-k, biased EDEN, PowerSGD, signs with a scale. A compressor that is unbiased by amplifying what it
sends (``subsample``, ``random_mask`` without ``unbiased=False``, ``qsgd`` with few levels) does not qualify: what
it leaves out is larger than the update, and the residual grows without bound.

Not here: compressors.
"""

from __future__ import annotations

from foedus.core.aggregate import Aggregator
from foedus.core.values import SERVER, Context, Message, State, Update
from foedus.errors import ConfigurationError, IncompatibleStages
from foedus.tree import Layout


def error_feedback(aggregator: Aggregator) -> Aggregator:
    """An aggregator whose clients keep what their message lacked and add it to their next update.

    A client sends C(x + e) and keeps e' = (x + e) − C(x + e), starting from 0; it keeps one vector of the model's
    length, on its own disk. Over the rounds in which it takes part, what it has sent in all is what it has learned
    in all, up to the residual it still holds.
    Source: Seide et al. 2014; Stich, Cordonnier & Jaggi 2018 (arXiv 1809.07599), algorithm 1; Karimireddy et al. 2019
    (arXiv 1901.09847), algorithm 2.

    Args:
        aggregator: usually a chain that ends in a mean, e.g. ``chain(top_k(0.01), mean())``.

    Raises:
        IncompatibleStages: the aggregator's clients keep something already, or it adds noise or masks.

    Example:
        >>> import numpy as np
        >>> from foedus.core.aggregate import mean
        >>> from foedus.core.sparse import top_k
        >>> from foedus.core.stage import chain
        >>> rule = error_feedback(chain(top_k(0.5), mean()))
        >>> update, context = Update(np.array([3.0, 1.0]), 1.0), Context(0, 1, 0, size=2)
        >>> rule.remember(update, rule.encode(update, context), context)["residual"].tolist()
        [0.0, 1.0]
    """

    if aggregator.event is not None:
        raise IncompatibleStages(
            f"{aggregator.label} adds noise for privacy, and a client that keeps what its message lacked would keep "
            "that noise, and send it later. Leave error_feedback() out"
        )
    if aggregator.hidden:
        raise IncompatibleStages(
            f"{aggregator.label} shows sums only, and a residual is what one message lacked. Leave error_feedback() "
            "out: "
            "what adds up under masks (rotate(), quantise(bits, scale=...), random_mask(share)) is unbiased"
        )
    if aggregator.remember is not None:
        raise IncompatibleStages(f"{aggregator.label} keeps a residual already; one error_feedback() is enough")

    def owed(update: Update, context: Context) -> Update:
        residual = context.kept.get("residual")
        if residual is None:
            return update
        if residual.shape != update.vector.shape:
            raise ConfigurationError(
                f"client {context.client} kept a residual of {residual.size} entries, where the update has "
                f"{update.vector.size}: it is of another model. Start a new run"
            )
        return update._replace(vector=update.vector + residual.astype(update.vector.dtype, copy=False))

    def encode(update: Update, context: Context) -> Message:
        return aggregator.encode(owed(update, context), context)

    def remember(update: Update, message: Message, context: Context) -> State:
        whole = owed(update, context)
        state = aggregator.init(context.layout or Layout((), (), ()))
        arrived = aggregator.admit(message, context)
        vector, _ = aggregator.decode(state, arrived, context._replace(client=SERVER))
        return {"residual": (whole.vector - vector).astype(whole.vector.dtype)}

    label = f"error_feedback({aggregator.label})"
    return aggregator._replace(encode=encode, remember=remember, label=label, encode_all=None)

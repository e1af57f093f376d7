"""What a server really holds under masks or encryption: one client's upload as it arrives, and the sum once it is open.

``look`` shows what an update is like after the algorithm's stages; here the protocol itself runs, and the attacker is
given the bytes. Under masks a whole conversation is carried out between a server and all clients of a cohort, with
keys, shares and masks, and what reaches the server of the victim's numbers is kept. Of ciphertexts the attacker makes
numbers in the only way there is without the silos' key: it decrypts them with a key of its own. Either is then a
:class:`~foedus.audit.seen.Seen` like any other, and every attack on updates takes it. That they come away with nothing
is what cryptography promises; here it is measured.

Not here: a server that lies (``disaggregation.py``); the attacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.audit.seen import Seen, Victim, opened, passed, pooled, trained
from foedus.backends import Trainer, open_trainer
from foedus.core.aggregate import Aggregator
from foedus.core.examples import Examples
from foedus.core.random import generator
from foedus.core.values import NOTHING, Context, Message
from foedus.errors import ConfigurationError
from foedus.protocol.secagg.conversation import check_revealed, converse
from foedus.protocol.secagg.messages import Channel, FromClient, Masked, Promise, terms_for
from foedus.rounds.work import UPDATE
from foedus.secure.homomorphic import forced, silo_key
from foedus.secure.planes import unpacked
from foedus.secure.primitives import digest
from foedus.sim.masks import brought
from foedus.tree import Vector


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """What a server holds of a victim.

    Attributes:
        upload: the victim's upload, read as numbers, of the length that its update has in the mean.
        total: the mean of the cohort once its sum is open; ``None`` if nobody else was in it.

    Example:
        >>> held = intercept(victim, others, through=fd.masked(withstand))  # doctest: +SKIP
        >>> fd.audit.invert(task, held.upload, known)  # noise from noise  # doctest: +SKIP
    """

    upload: Seen
    total: Seen | None


def intercept(
    victim: Victim, others: Sequence[Examples] = (), *, through: Aggregator, trainer: Trainer | None = None
) -> Uploaded:
    """Carry out a round under real masks or encryption, and keep what the server gets.

    Args:
        victim: who is attacked, and when.
        others: examples of the other clients of its cohort. Encrypted, it can be left out: then nothing is opened.
        through: an aggregator that masks or encrypts, before which nothing changes the number of entries.
        trainer: an open one of the same task, to save time.

    Raises:
        ConfigurationError: it neither masks nor encrypts, or what travels has other entries than the model.
        SecureAggregationFailed: so few show no sum.

    Example:
        >>> rule = fd.chain(fd.clip(1.0), fd.encrypted(8, key=fd.silo_key()))  # doctest: +SKIP
        >>> held = intercept(victim, through=rule)  # doctest: +SKIP
    """
    if not through.hidden:
        raise ConfigurationError(
            f"{through.label} neither masks nor encrypts: the server sees updates. Write foedus.audit.look(victim, "
            "through=...)"
        )
    cohort = _Cohort(victim, tuple(others), through, open_trainer(victim.task, seed=victim.seed) if trainer is None
                     else trainer)  # fmt: skip
    return cohort.masked() if through.masking is not None else cohort.encrypted()


@dataclass(frozen=True)
class _Cohort:
    """A victim and the others of its round."""

    victim: Victim
    others: tuple[Examples, ...]
    rule: Aggregator
    trainer: Trainer

    def masked(self) -> Uploaded:
        """A whole conversation, and what of the victim's numbers reached the server."""
        masking, messages = self.rule.masking, self._messages()
        assert masking is not None
        words = [message["sum"] for message in messages]
        channel = Channel(UPDATE, len(words[0]), masking.width)
        promise = Promise(masking.withstand, masking.least, (channel,))
        model = digest(self.victim.before.vector.tobytes(), self.victim.before.buffers.tobytes())
        draws = generator(self.victim.seed, "intercepted", self.victim.round)
        terms = terms_for(
            promise, session=draws.bytes(16), round=self.victim.round, attempt=1, model=model, graph=draws.bytes(32),
            clients=len(words),
        )  # fmt: skip
        held: dict[int, NDArray[Any]] = {}

        def heard(slot: int, message: FromClient) -> None:
            if isinstance(message, Masked):
                held[slot] = unpacked(message.values, masking.width, len(words[0]))

        owns = brought(promise, model, count=len(words))
        (total,) = check_revealed(converse(terms, owns, lambda slot: (words[slot],), heard=heard))
        mean = self._opened([{"sum": total, "count": np.array([len(words)], np.int64)}])
        return Uploaded(upload=self._read(held[0], mean), total=mean)

    def encrypted(self) -> Uploaded:
        """Ciphertexts of everybody; the victim's decrypted with a key that is not theirs."""
        messages = self._messages()
        mean = self._opened(messages) if self.others else None
        assert self.rule.sealed is not None
        numbers = forced(messages[0], silo_key(), silos=self.rule.sealed.silos)
        return Uploaded(upload=self._read(numbers, mean), total=mean)

    def _messages(self) -> list[Message]:
        """What everybody sends, as it would be added up: the victim first."""
        found, context = [], self._context()
        for number, examples in enumerate((self.victim.examples, *self.others)):
            vector = trained(self.victim, examples, self.trainer)
            each = context._replace(client=context.client + number)
            found.append(passed(self.rule, vector, each, weight=len(examples)))
        return found

    def _context(self) -> Context:
        layout, rule, one = self.trainer.layout, self.rule, self.victim
        told = NOTHING if rule.tell is None else rule.tell(rule.init(layout))
        return Context(one.seed, one.round, one.client, layout=layout, size=layout.size, told=told)

    def _opened(self, messages: Sequence[Message]) -> Seen:
        """A sum as the server may decode it."""
        return self._seen(opened(self.rule, messages, self._context()), summed=True)

    def _read(self, numbers: NDArray[Any], mean: Seen | None) -> Seen:
        """Numbers as they lie at the server, as an update: about 0, and as long as updates are."""
        size = self.trainer.layout.size
        if len(numbers) < size:
            raise ConfigurationError(
                f"{self.rule.label} sends {len(numbers)} numbers for {size} parameters, and an upload is read entry by "
                "entry. Leave out what changes the number of entries: intercept(through=chain(clip(...), masked(...)))"
            )
        found = numbers[:size].astype(np.float64)
        found -= found.mean()
        length = float(np.linalg.norm(mean.update)) if mean is not None else 1.0
        return self._seen(found * (length / max(float(np.linalg.norm(found)), 1e-30)), summed=False)

    def _seen(self, update: Vector, *, summed: bool) -> Seen:
        one, dtype = self.victim, self.victim.before.vector.dtype
        return Seen(
            before=one.before, update=update.astype(dtype), sent=np.ones(len(update), bool), layout=self.trainer.layout,
            spec=one.spec, plan=pooled(one, self.others if summed else ()), round=one.round,
        )  # fmt: skip

"""Masked sums in a simulation: what may not be with them, rounds too small to be shown, and the real protocol on
request.

By default messages are added up in the plain, which gives the same numbers, and the protocol's bytes are counted. With
``Settings(cryptography=True)`` every client of a round takes part in the real conversation: keys, shares, masks,
answers. Clients that the simulated world has lost leave it at a phase that the seed draws for them; those whose update
was refused, or that send nothing, leave it when they should send masked numbers.

Not here: the protocol (``foedus.protocol.secagg``), the aggregator (``foedus.secure.masked``).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.aggregate import Masking, Sealed
from foedus.core.compose import Algorithm
from foedus.core.random import generator, key
from foedus.core.timing import Hierarchical
from foedus.core.values import Message
from foedus.errors import ConfigurationError, IncompatibleStages, NoGuarantee, SecureAggregationFailed
from foedus.protocol.secagg.client import Own
from foedus.protocol.secagg.conversation import Outcome as Attempt
from foedus.protocol.secagg.conversation import converse
from foedus.protocol.secagg.messages import Channel, Identity, Promise, pinned, terms_for
from foedus.protocol.secagg.server import Phase
from foedus.rounds.masks import check_buffers, maskings, together
from foedus.rounds.work import BUFFERS, UPDATE, Job, Outcome
from foedus.secure.planes import packed_bytes
from foedus.secure.primitives import digest, identity_key
from foedus.sim.settings import Settings

Ints = NDArray[np.int64]


def hidings(algorithm: Algorithm, *, buffers: bool) -> dict[str, Masking | Sealed]:
    """The channels of which nobody sees single messages, because they are masked or encrypted."""
    found = ((c, rule.masking or rule.sealed) for c, rule in algorithm.channels(buffers=buffers))
    return {channel: hiding for channel, hiding in found if hiding is not None}


# --- what may not be ----------------------------------------------------------------------------------------


def check_masks(algorithm: Algorithm, settings: Settings, *, wanted: int | None, buffers: bool) -> None:
    """Refuse a run in which single updates would be seen beside masked sums, or no sum could ever be shown.

    Args:
        algorithm: the run's.
        settings: of the run.
        wanted: clients asked a round, where that is a number.
        buffers: whether buffers are averaged.

    Raises:
        ConfigurationError: says which, and what to write instead.
        NoGuarantee: so few are asked that masks could not withstand what was promised.
    """
    found = maskings(algorithm, buffers=buffers)
    if not found:
        if settings.cryptography:
            raise ConfigurationError(
                f"Settings(cryptography=True) runs the protocol of masked sums, and {algorithm.aggregator.label} masks "
                "nothing. Write aggregator=foedus.masked(...), or leave it out"
            )
        return
    check_buffers(algorithm, found, buffers=buffers)
    together(found)
    if settings.cryptography and isinstance(algorithm.timing, Hierarchical):
        raise ConfigurationError(
            f"with {algorithm.timing.label} partial sums are masked among the clients of an edge, which "
            "Settings(cryptography=True) does not rehearse. Leave out one of them"
        )
    for masking in found.values():
        _check_cohort(masking, wanted)
        if wanted is not None:
            masking.withstand.among(wanted)


def check_sealed(algorithm: Algorithm, *, population: int, wanted: int | None, buffers: bool) -> None:
    """Refuse a run in which single updates would be seen beside encrypted ones, or a sum could not be decrypted.

    Args:
        algorithm, wanted, buffers: as for :func:`check_masks`.
        population: how many clients there are.

    Raises:
        ConfigurationError: says which, and what to write instead.
    """
    sealed, label = algorithm.aggregator.sealed, algorithm.aggregator.label
    if sealed is None:
        return
    if population > sealed.silos:
        raise ConfigurationError(
            f"{label} is for {sealed.silos} silos, and there are {population}: write encrypted({population}, ...). "
            "Among many, masked(...) needs no common key"
        )
    if (wanted or population) < sealed.least:
        raise ConfigurationError(
            f"{label} decrypts no sum of fewer than {sealed.least}, and {wanted or population} are asked in a round"
        )
    if buffers and not algorithm.buffers.hidden:
        raise IncompatibleStages(
            f"the model's buffers (BatchNorm's statistics) are averaged by {algorithm.buffers.label}, which the server "
            f"sees of every client, while {label} hides the update. Write Task(..., average_buffers=False), or "
            "algorithm.with_(buffers=foedus.encrypted(...))"
        )


def _check_cohort(masking: Masking, wanted: int | None) -> None:
    if wanted is None:
        return
    most = masking.withstand.clients
    if wanted > most:
        raise ConfigurationError(
            f"{wanted} clients are asked in a round, and masked({masking.withstand.label}, ...) has room for {most}: "
            "sums "
            f"could wrap around. Write Withstand(clients={wanted}, ...)"
        )
    if wanted < masking.least:
        raise ConfigurationError(
            f"{wanted} clients are asked in a round, and masked({masking.withstand.label}, ...) shows no sum of "
            "fewer than "
            f"{masking.least}. Write Withstand(clients={wanted}, ...), or a smaller least="
        )


def check_asked(found: Mapping[str, Masking], asked: Ints) -> None:
    """Refuse a cohort, drawn by a sampler, that is too large for the sums.

    Raises:
        ConfigurationError: says how many there are.
    """
    for masking in found.values():
        _check_cohort(masking._replace(least=0), len(asked))


def unshown(found: Mapping[str, Masking | Sealed], outcome: Outcome, asked: int) -> str:
    """Why a round shows no sum: fewer were asked than can withstand what was promised, or have sent something than are
    to be in a sum, or somebody lied; empty if it does."""
    sums = {UPDATE: outcome.message, BUFFERS: outcome.buffers, **outcome.sides}
    for channel, hiding in found.items():
        message = sums.get(channel)
        if message is None:
            continue
        if int(message["count"][0]) < hiding.least:
            return f"{int(message['count'][0])} clients are in the sum, and {hiding.least} are needed"
        if isinstance(hiding, Masking) and (reason := _unfit(hiding, asked) or _lied(hiding, message)):
            return reason
    return ""


def _unfit(masking: Masking, asked: int) -> str:
    """Why so few clients would not begin a masked sum; empty if they would."""
    try:
        masking.withstand.among(asked)
    except (NoGuarantee, ConfigurationError) as error:
        return str(error)
    return ""


def _lied(masking: Masking, message: Message) -> str:
    """Why a sum is none; empty if it is one."""
    try:
        masking.check(message)
    except SecureAggregationFailed as error:
        return str(error)
    return ""


# --- the real protocol --------------------------------------------------------------------------------------


class Called(NamedTuple):
    """Who was asked in a round, positions int64 [C], and what they were sent."""

    number: int
    asked: Ints
    start: Weights


class Summed(NamedTuple):
    """A round's outcome with the sums of the real protocol; why one failed, or empty; bytes down beside the model, by
    client; figures for the record."""

    outcome: Outcome
    failed: str
    down: dict[int, int]
    told: dict[str, Any]


def summed(job: Job, found: Mapping[str, Masking], outcome: Outcome, called: Called) -> Summed:
    """Add up what was set apart by the real protocol: all channels in one conversation."""
    _check_whole(outcome)
    attempt = _attempt(job, found, outcome.apart, called)
    survivors, sums = len(attempt.survivors), {}
    if attempt.totals is not None:
        count = np.array([survivors], np.int64)
        sums = {
            channel: {"sum": total, "count": count.copy()}
            for channel, total in zip(_sent_in(found, outcome.apart), attempt.totals, strict=True)
        }
    reason = attempt.reason or next((r for name, m in sums.items() if (r := _lied(found[name], m))), "")
    asked = np.sort(called.asked).tolist()
    up, down = (dict(zip(asked, each.tolist(), strict=True)) for each in (attempt.up, attempt.down))
    told = {"survivors": survivors, "left": len(attempt.left)} | ({"failed": reason} if reason else {})
    sides = {name: message for name, message in sums.items() if name not in (UPDATE, BUFFERS)}
    outcome = replace(
        outcome, message=sums.get(UPDATE, outcome.message), buffers=sums.get(BUFFERS, outcome.buffers),
        sides=outcome.sides | sides, apart={}, sent=_sent(outcome, up, found),
    )  # fmt: skip
    return Summed(outcome, reason, down, told)


def _check_whole(outcome: Outcome) -> None:
    """Refuse messages of some channels only: masks are agreed on for all that travels."""
    kinds = {frozenset(messages): client for client, messages in outcome.apart.items() if messages}
    if len(kinds) > 1:
        (one, a), (other, b), *_ = kinds.items()
        raise IncompatibleStages(
            f"client {a} sent {sorted(one)}, and client {b} {sorted(other)}: one masked conversation is about the same "
            "channels for all. Take a method whose clients leave no channel out, or leave out cryptography=True"
        )


def _sent_in(found: Mapping[str, Masking], apart: Mapping[int, Mapping[str, Message]]) -> list[str]:
    """The channels in which something came; the update's, if nothing did."""
    first = next((messages for messages in apart.values() if messages), {})
    return [channel for channel in found if channel in first] or list(found)[:1]


def _sent(outcome: Outcome, up: Mapping[int, int], found: Mapping[str, Masking]) -> list[int]:
    """Bytes that clients really sent: what was foretold of masked messages, replaced by what the protocol took."""
    result = []
    for client, sent in zip(outcome.clients, outcome.sent, strict=True):
        mine = outcome.apart.get(client, {})
        modelled = sum(packed_bytes(len(m["sum"]), found[channel].width) for channel, m in mine.items())
        modelled += found[next(iter(mine))].overhead[0] if mine else 0
        result.append(sent - modelled + up.get(client, 0) if mine else up.get(client, sent))
    return result


def _attempt(
    job: Job, found: Mapping[str, Masking], apart: Mapping[int, Mapping[str, Message]], called: Called
) -> Attempt:
    """The conversation: all who were asked have a slot."""
    asked, names = np.sort(called.asked).tolist(), _sent_in(found, apart)
    messages = {client: [own[name]["sum"] for name in names] for client, own in apart.items() if own}
    sizes = [len(numbers) for numbers in next(iter(messages.values()))] if messages else [1]
    channels = tuple(Channel(name, size, found[name].width) for name, size in zip(names, sizes, strict=True))
    promise = Promise(*together(found), channels)
    model = digest(called.start.vector.tobytes(), called.start.buffers.tobytes())
    draw = generator(job.seed, "graph", called.number, UPDATE)
    session = digest(str(key(job.seed, "session")).encode())[:16]
    try:
        terms = terms_for(
            promise, session=session, round=called.number, attempt=1, model=model, graph=draw.bytes(32),
            clients=len(asked),
        )  # fmt: skip
    except (NoGuarantee, ConfigurationError) as error:
        nothing = np.zeros(len(asked), np.int64)
        return Attempt(None, nothing[:0], str(error), nothing, nothing, {}, [], {})
    lost = {slot: _lost_at(job, called, client) for slot, client in enumerate(asked) if client not in messages}
    owns = brought(promise, model, count=len(asked))
    return converse(terms, owns, lambda slot: tuple(messages[asked[slot]]), lost=lost)


_PHASES = (Phase.KEYS, Phase.SHARES, Phase.NUMBERS)


def _lost_at(job: Job, called: Called, client: int) -> Phase:
    """When a client is lost that sends no numbers."""
    return _PHASES[int(generator(job.seed, "lost at", called.number, client).integers(len(_PHASES)))]


def brought(promise: Promise, model: bytes, *, count: int) -> Sequence[Own]:
    """What clients bring to a conversation. Keys are no part of the result, so that they are drawn from the operating
    system here, too.
    """
    if not promise.withstand.malicious:
        return [Own(slot, promise, secrets.token_bytes(32), model) for slot in range(count)]
    private = [secrets.token_bytes(32) for _ in range(count)]
    trust = pinned({identity_key(one) for one in private})
    return [
        Own(slot, promise, secrets.token_bytes(32), model, identity=Identity(private[slot], trust))
        for slot in range(count)
    ]

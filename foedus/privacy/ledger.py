"""The ledger: what has been released, counted; and the budget that stops a run before it would be exceeded.

A ledger is a value. Charging it gives another; whoever keeps it writes it down *before* the release that it counts,
with the model that the release made, so that a restart finds both or neither. The same bytes sent again are one
release, and carry the same name; other bytes of the same round are another one, and count again. Runs decode a round
once, and need no names: an attempt that failed has shown nothing.

Not here: what a round is worth (``accounting.py``), which event a run makes (``claims.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.values import State
from foedus.errors import BudgetSpent, CheckpointError, NoGuarantee
from foedus.privacy.accounting import Accountant, History, checked, pld, rdp
from foedus.privacy.events import Event, Stream, as_json, known, of_json

VERSION = 1


@dataclass(frozen=True)
class Ledger:
    """What was released so far.

    Attributes:
        counts: events, in the order in which they first took place, and how often each has.
        round: the last one that was charged.
        releases: the names of that round's releases.

    Example:
        >>> from foedus.privacy.events import Gaussian
        >>> ledger = charged(Ledger(), Gaussian(1.0), round=1)
        >>> charged(ledger, Gaussian(1.0), round=1) == ledger  # the same release again
        True
        >>> charged(ledger, Gaussian(1.0), round=1, release="second attempt").counts
        ((Gaussian(noise_multiplier=1.0), 2),)
    """

    counts: tuple[tuple[Event, int], ...] = ()
    round: int = 0
    releases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much privacy may be spent in all. It is a hard stop: the release that would exceed it is not made.

    Attributes:
        epsilon, delta: never to be exceeded.
        planned: events and how often each is to take place, if all of that is fixed beforehand: then ε is that of the
            whole plan by the tighter ``pld``, and nothing outside the plan is released. Without it, a filter by ``rdp``
            decides release by release, whatever comes.
        hidden: whether whom the guarantee is against learns nothing of who took part. Only then sampling makes it
            stronger, and only ``poisson(rate)`` sampling does.

    Raises:
        NoGuarantee: the plan itself exceeds the budget.

    Example:
        >>> from foedus.privacy.events import Gaussian
        >>> budget = Budget(epsilon=8.0, delta=1e-5)
        >>> allows(Ledger(), Gaussian(1.0), budget), allows(Ledger(((Gaussian(1.0), 2),)), Gaussian(1.0), budget)
        (True, False)
    """

    epsilon: float
    delta: float
    planned: History = ()
    hidden: bool = False

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, above=True)
        check_number("delta", self.delta, above=True, below=1)
        object.__setattr__(self, "planned", checked(self.planned))
        if self.planned and (needed := pld(self.planned, self.delta)) > self.epsilon:
            raise NoGuarantee(
                f"the plan costs ε = {needed:.4g} at δ = {self.delta:g}, and the budget is {self.epsilon:g}. Plan "
                "fewer rounds, or more noise: foedus.calibrate() finds it"
            )

    @property
    def by(self) -> Accountant:
        """The accountant that decides."""
        return pld if self.planned else rdp

    @property
    def label(self) -> str:
        how = "planned" if self.planned else "filter"
        return f"epsilon={self.epsilon:g}, delta={self.delta:g}, {how}{', hidden cohorts' if self.hidden else ''}"


def spent(ledger: Ledger, delta: float, *, by: Accountant = rdp) -> float:
    """ε of all that the ledger counts.

    Args:
        ledger: what was released.
        delta: δ in (0, 1).
        by: ``rdp``, or ``pld`` if what was released had been fixed beforehand.

    Example:
        >>> from foedus.privacy.events import Gaussian
        >>> round(spent(Ledger(((Gaussian(4.0), 16),)), 1e-5), 2)
        4.73
    """
    return by(ledger.counts, delta)


def allows(ledger: Ledger, event: Event, budget: Budget, *, round: int | None = None) -> bool:
    """Whether one more event keeps within the budget.

    Args:
        ledger, event, budget: what was released, what is to be, and how much may be.
        round: of the run; by default the one after the ledger's last. (Streams are worth what their rounds are.)

    Example:
        >>> from foedus.privacy.events import Gaussian
        >>> allows(Ledger(), Gaussian(0.1), Budget(epsilon=1.0, delta=1e-5))
        False
    """
    round = ledger.round + 1 if round is None else round
    if isinstance(event, Stream) and round > event.rounds:
        return False
    counts = _added(ledger.counts, known(event), round)
    if not budget.planned:
        return rdp(counts, budget.delta) <= budget.epsilon
    checked(counts)
    left = dict(budget.planned)
    return all(count <= left.get(kind, 0) for kind, count in counts)


def charged(ledger: Ledger, event: Event, *, round: int, release: str = "", budget: Budget | None = None) -> Ledger:
    """The ledger with one more release, or the same if this release is counted already.

    Args:
        ledger: unchanged, whatever happens.
        event: what is about to be released.
        round: counted from 1; rounds do not go back.
        release: a name of these very bytes, such as their digest, where a round may be tried again.
        budget: refuse what would exceed it.

    Raises:
        NoGuarantee: the event is unknown, or against other neighbours than those before it.
        BudgetSpent: the budget does not allow it.
    """
    check_whole("round", round)
    event = known(event)
    if round == ledger.round and release in ledger.releases:
        return ledger
    if round < ledger.round:
        raise NoGuarantee(
            f"round {round} comes after round {ledger.round} of the ledger. A run that goes on from an older state "
            "releases anew: keep the ledger with the state, and write it before the release"
        )
    if round == ledger.round and isinstance(event, Stream):
        raise NoGuarantee(
            f"round {round} was released once, and the noise of {event} was planned for each round once: a second "
            "attempt is not covered. Let the round be one of nobody"
        )
    counts = _added(ledger.counts, event, round)
    checked(counts)
    if budget is not None and not allows(ledger, event, budget, round=round):
        raise BudgetSpent(
            f"round {round} would exceed the privacy budget ε = {budget.epsilon:g} at δ = {budget.delta:g}; "
            f"ε = {spent(ledger, budget.delta, by=budget.by):.4g} is spent"
        )
    before = ledger.releases if round == ledger.round else ()
    return Ledger(counts, round, (*before, release))


def _added(counts: tuple[tuple[Event, int], ...], event: Event, round: int) -> tuple[tuple[Event, int], ...]:
    """With one more; of a stream, with all rounds up to this one, since those left out pass as rounds of nobody."""
    before = dict(counts)
    now = round if isinstance(event, Stream) else before.get(event, 0) + 1
    return tuple((before | {event: now}).items())


# --- checkpoints --------------------------------------------------------------------------------------------


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """A ledger as plain values for JSON.

    Example:
        >>> of_ledger_json(ledger_json(Ledger())) == Ledger()
        True
    """
    counts = [{"count": count, **as_json(event)} for event, count in ledger.counts]
    return {"version": VERSION, "round": ledger.round, "releases": list(ledger.releases), "counts": counts}


def of_ledger_json(told: Mapping[str, Any]) -> Ledger:
    """The inverse of :func:`ledger_json`.

    Raises:
        CheckpointError: it is no ledger of this version.
        NoGuarantee: it counts an event that is unknown here.
    """
    if told.get("version") != VERSION:
        raise CheckpointError(f"the privacy ledger has version {told.get('version')!r}, and {VERSION} is read here")
    try:
        rows = [dict(row) for row in told["counts"]]
        pairs = [(row.pop("count"), row) for row in rows]
        counts = checked([(of_json(row), count) for count, row in pairs])
        return Ledger(counts, int(told["round"]), tuple(map(str, told["releases"])))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, NoGuarantee):
            raise
        raise CheckpointError(f"the privacy ledger is damaged: {error!r}") from error


def ledger_state(ledger: Ledger) -> State:
    """A ledger as arrays by name, for a checkpoint: its JSON's bytes.

    Example:
        >>> of_ledger_state(ledger_state(Ledger())) == Ledger()
        True
    """
    return {"ledger": np.frombuffer(json.dumps(ledger_json(ledger)).encode(), np.uint8)}


def of_ledger_state(state: Mapping[str, NDArray[Any]]) -> Ledger:
    """The inverse of :func:`ledger_state`; an empty state is an empty ledger."""
    if "ledger" not in state:
        return Ledger()
    try:
        told = json.loads(state["ledger"].tobytes())
    except ValueError as error:
        raise CheckpointError(f"the privacy ledger is damaged: {error}") from error
    return of_ledger_json(told)

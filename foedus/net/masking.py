"""One attempt at a masked sum on the server: who has which slot, whose turn it is, and when time is up.

The conversation is a pure machine (``protocol/secagg/server.py``); here are its clock and its letter boxes. All of it
lies in memory: when the process dies, or the attempt fails, nothing of it is left, and another attempt begins with
fresh keys. Clients ask (``Confer``), and are told their next turn when there is one.

Not here: what the sum is made into (``learning.py``), who is let in (``coordinator``), the client's side
(``conferring.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import MalformedMessage, UploadRefused
from foedus.protocol.blob import digest_of
from foedus.protocol.messages import Blob
from foedus.protocol.secagg import server as machine
from foedus.protocol.secagg.freight import Invited, invitation_blob, message_blob, message_of
from foedus.protocol.secagg.messages import Keys, Masked, Parcels, Shares, Terms, Vote
from foedus.protocol.secagg.server import Close, From, Gone, Phase

_TURN = {Phase.KEYS: 1, Phase.SHARES: 2, Phase.NUMBERS: 3, Phase.VOTES: 4, Phase.ANSWERS: 5}
_WANTED: dict[Phase, type[Any]] = {
    Phase.KEYS: Keys, Phase.SHARES: Parcels, Phase.NUMBERS: Masked, Phase.VOTES: Vote, Phase.ANSWERS: Shares,
}  # fmt: skip
OVER = (Phase.DONE, Phase.FAILED)


class Limits(NamedTuple):
    """When those who are silent are taken for lost: at every stage after ``patience`` seconds, and where numbers are
    waited for, which takes as long as training does, at ``numbers_by`` on the server's clock."""

    patience: float
    numbers_by: float


class _Letter(NamedTuple):
    """What a client is to be told: the number of the turn, and its body."""

    turn: int
    body: Blob


@dataclass
class MaskedSum:
    """An attempt.

    Attributes:
        terms: what it is about.
        positions: of the clients, by slot.
        limits: how long is waited.
        state: of the conversation.
        closes: when time is up for the present stage.
        totals: the opened sums of all channels; ``None`` as long as there are none.
        survivors: slots of those in it.
        reason: why it failed; empty if it did not.
        up: bytes that each client sent, by slot.
    """

    terms: Terms
    positions: Sequence[int]
    limits: Limits
    closes: float
    state: machine.Server = field(init=False)
    totals: tuple[NDArray[Any], ...] | None = None
    survivors: Sequence[int] = ()
    reason: str = ""
    up: list[int] = field(default_factory=list)
    _letters: dict[int, _Letter] = field(default_factory=dict)
    _bodies: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    _turns: dict[int, int] = field(default_factory=dict)  # how many turns each client has been sent

    def __post_init__(self) -> None:
        self.state = machine.open_attempt(self.terms)
        self.up = [0] * len(self.positions)
        for slot in range(len(self.positions)):
            self._post(slot, 1, invitation_blob(Invited(self.terms, slot)))

    @property
    def over(self) -> bool:
        """Whether there is a sum, or never will be."""
        return self.state.phase in OVER

    @property
    def opening(self) -> bool:
        """Whether clients are asked to help take masks off: from then on there is no other attempt."""
        return self.state.phase in (Phase.VOTES, Phase.ANSWERS)

    def slot(self, position: int) -> int | None:
        """A client's slot; ``None`` if it has none."""
        return self.positions.index(position) if position in self.positions else None

    def letter(self, slot: int, after: int) -> _Letter | None:
        """A client's next turn, if it is later than the one that it has."""
        found = self._letters.get(slot)
        return found if found is not None and found.turn > after else None

    def body(self, digest: bytes, position: int) -> bytes | None:
        """The bytes of a turn, for the client whose turn it is."""
        owner, content = self._bodies.get(digest, (-1, b""))
        return content if owner == position else None

    def answered(self, slot: int, turn: int) -> bool:
        """Whether the answer to a turn is no longer waited for: it came, or its time is over."""
        return self.over or turn != self._letters[slot].turn or bool(self.state.came[slot])

    def take(self, slot: int, content: memoryview, now: float) -> None:
        """A client's answer to its last turn.

        Raises:
            MalformedMessage, UploadRefused: it is not what is waited for; nothing has changed.
        """
        wanted = _WANTED.get(self.state.phase)
        if wanted is None:
            raise MalformedMessage("this masked sum is over")
        message = message_of(content, (wanted,))
        if isinstance(message, Masked):  # kept beyond the upload's memory
            message = Masked(np.array(message.values))
        self.up[slot] += len(content)
        for action in self._step(From(slot, message), now):
            if isinstance(action, machine.Refused):
                raise UploadRefused(action.reason)

    def gone(self, slot: int, now: float) -> None:
        """A client will send nothing more."""
        self._step(Gone(slot), now)

    def tick(self, now: float) -> None:
        """Let time pass."""
        if not self.over and now >= self.closes:
            self._step(Close(), now)

    def _step(self, event: machine.Event, now: float) -> tuple[machine.Action, ...]:
        before = self.state.phase
        self.state, actions = machine.step(self.state, event)
        if self.state.phase is not before:
            late = self.state.phase is Phase.NUMBERS
            self.closes = max(self.limits.numbers_by, now) if late else now + self.limits.patience
        for action in actions:
            match action:
                case machine.Send(slot, message):
                    self._post(slot, _TURN[self.state.phase], message_blob(message, slot=slot))
                case machine.Revealed(totals, survivors):
                    self.totals, self.survivors = totals, survivors.tolist()
                case machine.Failed(reason):
                    self.reason = reason
        if self.over:
            self._bodies.clear()
        return actions

    def _post(self, slot: int, turn: int, content: bytes) -> None:
        """Put a turn into a client's box; the one before is of no more use."""
        if (before := self._letters.get(slot)) is not None:
            self._bodies.pop(before.body.digest, None)
        body = Blob(digest=digest_of(content), size=len(content))
        self._letters[slot] = _Letter(turn, body)
        self._bodies[body.digest] = self.positions[slot], content


__all__ = ["Limits", "MaskedSum"]

"""Sums that aggregation workers have merged, as the coordinator and the workers themselves see them.

Sums lie among the blobs, encrypted under a key that the roles of one federation share: a sum of few is nearly an
update. A *step* here is one attempt of a round, so that what an attempt that failed has gathered is in no other.

Not here: rows (``partials.py``), merging (``aggregation.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpx

from foedus.errors import ConfigurationError
from foedus.net.blobs import Blobs
from foedus.net.brokers.partials import Gathered, Partials, Step
from foedus.net.brokers.receipts import Receipt, attempt_step
from foedus.net.learning import Gathering, Learning
from foedus.net.sealing import Vault
from foedus.net.store import Store
from foedus.protocol import blob
from foedus.rounds.freight import parcel_of

__all__ = ["Elsewhere", "Keeper", "check_fits"]


class Elsewhere:
    """The coordinator's view.

    Args:
        partials: rows.
        blobs: sums.
        vault: opens them.
    """

    def __init__(self, partials: Partials, blobs: Blobs, vault: Vault) -> None:
        self._partials, self._blobs, self._vault = partials, blobs, vault
        self._forgotten: dict[str, Step] = {}

    def came(self, run: str, round: int, attempt: int) -> list[Gathered]:
        """Whose updates were merged or refused in an attempt; what is of earlier ones is removed."""
        step = attempt_step(run, round, attempt)
        if self._forgotten.get(run) != step:
            for digest in self._partials.forget_before(step):
                self._blobs.remove(digest)
            self._forgotten[run] = step
        return self._partials.gathered(step)

    def whole(self, run: str, round: int, attempt: int) -> tuple[list[bytes], list[Gathered]]:
        """The sums of an attempt, and who is in them, of one moment."""
        step = attempt_step(run, round, attempt)
        sums, who = self._partials.whole(step)
        return [self._vault.open(self._blobs.get(each.sum), about(step)) for each in sums], who


class Keeper:
    """What a worker needs: bytes from gateways, the runs' present states, blobs.

    Args:
        store, blobs: the federation's.
        learnings: by run; they follow the store.
        vault: seals sums.
        way: an HTTP client that the gateways let in.
    """

    def __init__(
        self, store: Store, blobs: Blobs, *, learnings: Mapping[str, Learning], vault: Vault, way: httpx.Client
    ) -> None:  # fmt: skip
        self._store, self._blobs, self._learnings = store, blobs, learnings
        self._vault, self._way = vault, way
        self._read: dict[str, str] = {}  # run → the checkpoint that its learning is at

    def fetch(self, receipt: Receipt) -> bytes | None:
        """The bytes of a receipt from the gateway that has them; None if it has not, or they are others."""
        try:
            response = self._way.get(receipt.uri)
        except httpx.HTTPError:
            return None
        content = response.content if response.status_code == 200 else b""
        good = len(content) == receipt.size and blob.digest_of(content) == receipt.digest
        return content if good else None

    def release(self, receipt: Receipt) -> None:
        """The gateway may forget the bytes."""
        try:
            self._way.delete(receipt.uri)
        except httpx.HTTPError:
            return

    def sum(self, step: Step, _: int, content: bytes | None) -> _Sum | None:
        """A sum to go on with; None if the step is over."""
        run, round, _ = step
        learning = self._learnings.get(run)
        if learning is None:
            return None
        self._follow(run, learning)
        if learning.step.round != round:
            return None
        seats = max(1, learning.population)
        if content is None:
            return _Sum(learning, Gathering(learning.step, seats=seats), self._vault, step)
        gathering = learning.resumed(self._vault.open(content, about(step)), seats=seats)
        return _Sum(learning, gathering, self._vault, step)

    def _follow(self, run: str, learning: Learning) -> None:
        """Bring a run's state to what the coordinator wrote last."""
        with self._store.begin() as rows:
            row, clients = rows.run(run), rows.clients()
        learning.enrolled(clients)
        if row is not None and row.checkpoint and self._read.get(run) != row.checkpoint:
            learning.restore(self._blobs.get(row.checkpoint))
            self._read[run] = row.checkpoint

    def put(self, content: bytes) -> str:
        """Keep a sum; every one is sealed with a nonce of its own."""
        return self._blobs.put(content)

    def get(self, digest: str) -> bytes:
        """A sum that was put."""
        return self._blobs.get(digest)

    def remove(self, digest: str) -> None:
        """Nobody needs it any more."""
        self._blobs.remove(digest)


class _Sum:
    """One partition's sum of an attempt."""

    def __init__(self, learning: Learning, gathering: Gathering, vault: Vault, step: Step) -> None:
        self._learning, self._gathering, self._vault, self._step = learning, gathering, vault, step

    def take(self, receipt: Receipt, content: bytes) -> None:
        """Check an update as the coordinator would, and merge it."""
        parcel = parcel_of(blob.unpack(content))
        self._learning.take(
            self._gathering, receipt.position, parcel, version=receipt.version, scale=receipt.scale
        )  # fmt: skip

    def content(self) -> bytes:
        """Sealed."""
        return self._vault.seal(self._learning.partial(self._gathering), about(self._step))


def about(step: Step) -> bytes:
    """What a sum is of, so that one cannot be put in another's place."""
    return json.dumps(["partial sum", *step]).encode()


def check_fits(learning: Learning) -> None:
    """Refuse what cannot be merged by several workers.

    Errors: `ConfigurationError`.
    """
    served = learning.served
    what = f"the run {served.name!r} ({served.algorithm.label})"
    if learning.masking is not None:
        raise ConfigurationError(
            f"{what} masks its updates: their sum is what all its clients talk about with one server, and no worker "
            "can merge a part of it. Serve it without --broker"
        )
    if served.algorithm.timing is not None or not learning.summable:
        raise ConfigurationError(
            f"{what} needs its updates in one place, one by one or in order, and cannot be merged by several workers. "
            "Serve it without --broker"
        )
    if served.each.over_selection > 1:
        raise ConfigurationError(
            f"{what} lets in {served.each.over_selection} times the cohort: behind a broker all that are let in are "
            "merged. Leave out --over-selection, or serve it without --broker"
        )

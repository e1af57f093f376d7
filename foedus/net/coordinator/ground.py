"""What a coordinator stands on: where it writes, what it draws keys from, whom it tells what happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from foedus.net.blobs import Blobs
from foedus.net.brokers.elsewhere import Elsewhere
from foedus.net.identity.keys import SigningKey
from foedus.net.sealing import Vault
from foedus.net.store import Store
from foedus.net.uploads import Uploads


class Who(Protocol):
    """Somebody whom the transport has let in."""

    @property
    def position(self) -> int: ...

    @property
    def name(self) -> str: ...


Watch = Callable[[str, Mapping[str, Any]], None]  # something that happened, for logs and counters


def _unwatched(event: str, told: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a coordinator stands on.

    Attributes:
        store, blobs: where things are written.
        secret: so many random bytes that nobody can guess, e.g. ``secrets.token_bytes``.
        uploads: memory for uploads.
        epoch: of the lease that this process writes under; ``None`` where there is no lease (tests).
        signing: the server's key, under which clients are accepted and models published; ``None``: unsigned (tests).
        watch: is told what happens.
        memory: encrypts partial sums under a key that no disk has; ``None``: they are not written.
        operator: encrypts the keys of rounds, in mode sealed.
        elsewhere: sums that aggregation workers merge, where updates come by a broker.
        pause: the least seconds after which clients come back.
    """

    store: Store
    blobs: Blobs
    secret: Callable[[int], bytes]
    uploads: Uploads = field(default_factory=Uploads)
    epoch: Callable[[], int | None] = lambda: None
    signing: SigningKey | None = None
    watch: Watch = _unwatched
    memory: Vault | None = None
    operator: Vault | None = None
    elsewhere: Elsewhere | None = None
    pause: float = 0.5


__all__ = ["Ground", "Watch", "Who"]

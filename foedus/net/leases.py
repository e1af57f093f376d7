"""Who leads: one server process of several, for as long as its lease runs.

A lease is a row {name, holder, address, epoch, expires_at}. Its holder renews it well before it runs out; when it has
run out, whoever asks next takes it, with the next epoch. A process that stood still meanwhile may believe that it
leads: its writes carry the old epoch, and the store refuses them (``store.py``).

Not here: what a leader does (``coordinator``), and how the others forward to it (``http.py``).
"""

from __future__ import annotations

from foedus.net.store import LEADER, Lease, Store

SECONDS = 6.0  # how long a lease runs; renewed after a third of it


def lead(
    store: Store, holder: str, address: str, now: float, *, seconds: float = SECONDS, fresh: bool = False
) -> Lease:  # fmt: skip
    """Take the lease if it is free, renew it if it is ours; the lease as it is then, whoever holds it.

    Args:
        store: shared by all server processes.
        holder: a name of this process, that no other has.
        address: where others reach it.
        now: seconds.
        seconds: how long the lease runs from now on.
        fresh: this process has just begun: what another of the same name left is taken, with a new epoch.

    Example:
        >>> from foedus.net.store import open_store
        >>> store = open_store("sqlite://")
        >>> lead(store, "a", "http://a", now=0.0).epoch, lead(store, "b", "http://b", now=1.0).holder
        (1, 'a')
        >>> lead(store, "b", "http://b", now=60.0).epoch
        2
        >>> store.close()
    """
    with store.begin() as rows:
        found = rows.lease(LEADER)
        if found is not None and found.holder != holder and found.expires_at > now:
            return found
        kept = found is not None and found.holder == holder and found.expires_at > now and not fresh
        epoch = 1 if found is None else found.epoch + (not kept)
        taken = Lease(LEADER, holder, address, epoch, now + seconds)
        rows.put_lease(taken)
        return taken


def resign(store: Store, lease: Lease, now: float) -> None:
    """Give the lease back, so that another process need not wait for its end."""
    with store.begin() as rows:
        found = rows.lease(LEADER)
        if found is not None and (found.holder, found.epoch) == (lease.holder, lease.epoch):
            rows.put_lease(found._replace(expires_at=now))

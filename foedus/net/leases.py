"""Who leads: one server process of several, for as long as its lease runs.

A lease is a row {name, holder, address, epoch, expires_at}. Its holder renews it well before it runs out; when it has
run out, whoever asks next takes it, with the next epoch. A process that stood still meanwhile may believe that it
leads: its writes carry the old epoch, and the store refuses them (``store.py``).

Every process has a lease of its own beside it, by which the others know that it is there: clients are told of all, and
go to another when the one they joined is gone.

Not here: what a leader does (``coordinator``), and how the others forward to it (``http.py``).
"""

from __future__ import annotations

from foedus.net.store import LEADER, Lease, Store

SECONDS = 6.0  # how long a lease runs; renewed after a third of it
THERE = "server "  # the lease of a process that is there; after it comes its name
THERE_S = 60.0  # how long one is believed to be there that says no more


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


def stand(store: Store, holder: str, address: str, now: float) -> tuple[str, ...]:
    """Say that a process is there, whether it leads or not; the addresses of all that are.

    Args:
        store, holder, address: as for :func:`lead`.
        now: seconds.

    Example:
        >>> from foedus.net.store import open_store
        >>> store = open_store("sqlite://")
        >>> stand(store, "a", "http://a", now=0.0), stand(store, "b", "http://b", now=1.0)
        (('http://a',), ('http://a', 'http://b'))
        >>> stand(store, "b", "http://b", now=100.0)
        ('http://b',)
        >>> store.close()
    """
    with store.begin() as rows:
        there = {lease.name: lease for lease in rows.leases() if lease.name.startswith(THERE)}
        for name in [name for name, lease in there.items() if lease.expires_at <= now]:
            rows.forget_lease(name)
            del there[name]
        mine = Lease(THERE + holder, holder, address, 0, now + THERE_S)
        known = there.pop(mine.name, mine._replace(expires_at=now))
        if known.expires_at < now + THERE_S / 2 or known.address != address:
            rows.put_lease(mine)
        return tuple(sorted({lease.address for lease in there.values()} | {address}))


def leave(store: Store, holder: str) -> None:
    """Say that a process is there no more."""
    with store.begin() as rows:
        rows.forget_lease(THERE + holder)

"""Who is a member of a federation, and whom it has invited.

Somebody invited gets a *join token*, a text of 192 random bits that lets one client in once, until it expires. The
server keeps its digest only, so that a stolen database opens nothing. A client shows the token together with the public
key it made for itself; in one transaction the token is spent and the client gets the next position. If the answer is
lost and the client asks again with the same token and key, it gets the same answer; another key gets nothing.

A member that is revoked keeps its position, and its name and key are never given out again.

Not here: tables (``net/store.py``), what members prove at each visit (``sessions.py``).
"""

from __future__ import annotations

import secrets

from sqlalchemy.exc import IntegrityError

from foedus.errors import EnrolmentRefused, StorageError
from foedus.net.identity.callers import TRAIN, Scope, checked_name, token_digest, written
from foedus.net.store import Enrolled, InvitedRow, Store, Transaction

__all__ = ["Directory", "invitation"]

_PREFIX = "foedus_join_"  # so that scanners for leaked secrets know what they have found
_TRIES = 8


class Directory:
    """Members and invitations, in a store; every call is one transaction.

    Example:
        >>> from foedus.net.store import open_store
        >>> store = open_store("sqlite://")
        >>> token, invited = invitation(now=0.0)
        >>> directory = Directory(store)
        >>> directory.invite(invited)
        >>> directory.enrol(token, "clinic", bytes(32), now=1.0).position
        0
        >>> store.close()
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def invite(self, invited: InvitedRow) -> None:
        """Keep an invitation."""
        with self._store.begin() as rows:
            rows.put_invitation(invited)

    def enrol(self, token: str, name: str, key: bytes, *, now: float) -> Enrolled:
        """Spend a token on a client, or say again what it was spent on.

        Errors: `EnrolmentRefused`.
        """
        claim = Enrolled(-1, checked_name(name), key, now, invited=token_digest(token))
        for _ in range(_TRIES):
            try:
                with self._store.begin() as rows:
                    return _enrolled(rows, claim)
            except StorageError as error:  # another server process gave out the same position: look again
                if not _clash(error):
                    raise
        raise StorageError("too many clients are joining at this moment; try again in a few seconds")

    def member(self, name: str) -> Enrolled | None:
        """The member of a name, revoked or not."""
        with self._store.begin() as rows:
            return rows.client(name)

    def members(self) -> list[Enrolled]:
        """Everybody, by position."""
        with self._store.begin() as rows:
            return rows.clients()

    def revoke(self, name: str, *, now: float) -> None:
        """Let a member in no more; raises `EnrolmentRefused` for a name that nobody has."""
        with self._store.begin() as rows:
            found = rows.client(name)
            if found is None:
                raise EnrolmentRefused(f"nobody is called {name!r} here; foedus members show lists who is")
            rows.put_client(found._replace(revoked_at=now))

    def revoked(self) -> frozenset[str]:
        """The names of those who are let in no more."""
        with self._store.begin() as rows:
            return frozenset(rows.revoked())


def invitation(
    *,
    now: float,
    hours: float = 24.0,
    uses: int = 1,
    scope: frozenset[Scope] = TRAIN,
    silo: bool = True,
    name: str = "",
    population: str = "",
) -> tuple[str, InvitedRow]:
    """A new join token, to be shown once, and what is kept of it.

    Args:
        now: seconds since 1970.
        hours: how long it is good.
        uses: how many clients it lets in.
        scope: what they may do.
        silo: whether they get a certificate and must show it where the server ends TLS itself; devices do without.
        name: the only name it is good for; empty for any.
        population: whose runs they take part in; empty for those runs that are of no population.

    Example:
        >>> token, kept = invitation(now=0.0)
        >>> kept.digest == token_digest(token), token in repr(kept)
        (True, False)
    """
    token = _PREFIX + secrets.token_urlsafe(24)
    named = checked_name(name) if name else ""
    of = checked_name(population) if population else ""
    return token, InvitedRow(token_digest(token), now + 3600 * hours, uses, written(scope), silo, named, of)


def _enrolled(rows: Transaction, claim: Enrolled) -> Enrolled:
    invited = rows.invitation(claim.invited)
    if invited is None:
        raise EnrolmentRefused(
            "this join token is not of this server. A token is shown once, when it is made; ask whoever runs the "
            "server for a new one (foedus members invite)"
        )
    holder = rows.client(claim.name) or rows.client_of(claim.key)
    if holder is not None:
        return _again(holder, claim)
    _usable(invited, claim)
    made = rows.enrol(claim.name, claim.key, claim.enrolled_at)
    made = made._replace(scope=invited.scope, silo=invited.silo, invited=invited.digest, population=invited.population)
    rows.put_client(made)
    rows.put_invitation(invited._replace(uses=invited.uses - 1))
    return made


def _again(holder: Enrolled, claim: Enrolled) -> Enrolled:
    """The member that an earlier try of the same client has made; nobody else's."""
    if holder.revoked_at is not None:
        raise EnrolmentRefused(
            f"{holder.name!r} was revoked; neither its name nor its key come back. Join under another name, with a new "
            "key (an empty folder) and a new token"
        )
    if (holder.name, holder.key, holder.invited) != (claim.name, claim.key, claim.invited):
        raise EnrolmentRefused(
            f"the name {claim.name!r} or its key belongs to a member already. Choose another name (--name), or go on "
            "with the folder in which that member's key lies"
        )
    return holder


def _usable(invited: InvitedRow, claim: Enrolled) -> None:
    if claim.enrolled_at > invited.expires_at:
        raise EnrolmentRefused(
            f"this join token expired {(claim.enrolled_at - invited.expires_at) / 3600:.1f} hours ago by the server's "
            "clock. Ask whoever runs the server for a new one (foedus members invite)"
        )
    if invited.uses < 1:
        raise EnrolmentRefused(
            "this join token has been used already. If it was not you who used it, tell whoever runs the server at "
            "once: somebody else has joined in your place"
        )
    if invited.name and invited.name != claim.name:
        raise EnrolmentRefused(f"this join token is for {invited.name!r}, not for {claim.name!r}")


def _clash(error: BaseException | None) -> bool:
    return isinstance(error, IntegrityError) or (error is not None and _clash(error.__cause__))

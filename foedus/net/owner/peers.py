"""The other clients, as this owner knows them: for masked sums that withstand a server that lies.

A server could play all the others, if it were the one to say who they are. So owners tell each other their public keys
by another way (on paper, by telephone), or have them signed by an authority that is not the server. ``peers.key``, made
when it is first needed, is this client's own; ``peers.txt`` has one line for each other:

    # St. Mary's
    6a1f…                       the public key of another client, 64 hexadecimal digits
    authority 09c2…             or: an authority's public key, and
    certificate 77ab…           its signature of this client's own (``secagg.messages.certificate``)

Not here: what identities are for (``protocol/secagg``).
"""

from __future__ import annotations

import os
from pathlib import Path

from foedus.errors import ConfigurationError, NoGuarantee
from foedus.net.identity.files import create_once, private_folder
from foedus.protocol.secagg.messages import Identity, certified, pinned
from foedus.record.files import storage
from foedus.secure.primitives import KEY, SIGNATURE, identity_key

__all__ = ["identity", "own_secret"]


def identity(folder: Path) -> Identity:
    """This client's own identity, and how it knows the others.

    Args:
        folder: the owner's.

    Raises:
        NoGuarantee: it knows no others; says how to tell them.
        ConfigurationError: a line of ``peers.txt`` is none.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "peers.txt").write_text("00" * 32)
        >>> identity(folder).trust.label
        'pinned(2 identities)'
    """
    private, path = own_secret(folder), folder / "peers.txt"
    public = identity_key(private)
    if not path.exists():
        raise NoGuarantee(
            "this run's masked sums are to withstand a server that lies, so clients must know each other by keys that "
            f"it did not issue. Give the other owners this client's public key, {public.hex()}, and write theirs, one "
            f"a line, into {path}"
        )
    keys, authority, certificate = {public}, b"", b""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) == 1:
            keys.add(_hex(words[0], KEY, path, number))
        elif len(words) == 2 and words[0] == "authority":
            authority = _hex(words[1], KEY, path, number)
        elif len(words) == 2 and words[0] == "certificate":
            certificate = _hex(words[1], SIGNATURE, path, number)
        elif words:
            raise ConfigurationError(
                f"{path}, line {number}: a line is a public key, `authority KEY` or `certificate SIGNATURE`; not "
                f"{line!r}"
            )
    return Identity(private, certified(authority) if authority else pinned(keys), certificate)


def own_secret(folder: Path) -> bytes:
    """This client's secret key, readable by its owner only."""
    path = folder / "peers.key"
    private_folder(folder)
    if not path.exists():
        create_once(path, os.urandom(KEY))
    with storage(path):
        found = path.read_bytes()
    if len(found) != KEY:
        raise ConfigurationError(f"{path} is damaged: it holds {len(found)} bytes, and a key has {KEY}. Restore it")
    return found


def _hex(text: str, size: int, path: Path, number: int) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != size:
        raise ConfigurationError(f"{path}, line {number}: {2 * size} hexadecimal digits are expected, not {text!r}")
    return found

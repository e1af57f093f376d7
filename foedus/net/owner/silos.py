"""Silos agree on the key of their encrypted sums, by files that anybody may pass on: mail, a shared drive, the server.

Every silo runs the same command now and then. Each time it does whatever it can by now, writes its own files beside the
others', and says whom it still waits for; in the end the key lies in its owner's folder. What is in the files is
signed, and sealed where it is secret (``secure/silo_keys.py``): whoever passes them on learns nothing and can change
nothing.

| file | what |
|---|---|
| ``NAME.offer`` | a silo's fresh public key |
| ``NAME.wrapped`` | the key, sealed for that silo by the first by name |
| ``NAME.receipt`` | which key that silo has |

Until all have said that they have the same, the secrets lie in ``silo-SESSION.*`` in the owner's folder. Afterwards
``agreed-SESSION`` there has what this silo wrote for the others: where files were lost that somebody else still waits
for, the same command puts them back.

Not here: how the identities in the roster came to be known: by telephone or on paper, from person to person.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from foedus.errors import ConfigurationError, ForgedMessage, SecureAggregationFailed
from foedus.net.identity.files import create_once, private_folder, read_secret, write_secret
from foedus.net.owner.folder import OwnerFolder
from foedus.net.owner.peers import own_secret
from foedus.record.files import replace, storage
from foedus.secure.homomorphic import SiloKey, silo_key
from foedus.secure.primitives import KEY
from foedus.secure.silo_keys import Offer, Receipt, Silo, Wrapped

__all__ = ["Agreement", "agree", "roster_of"]

TEXTS = ("silo", "maker")  # fields that are names; all others are bytes
LONGEST = 1 << 20  # bytes of a file that somebody else wrote
Told = TypeVar("Told", Offer, Wrapped, Receipt)


class Agreement(NamedTuple):
    """How far it is.

    Attributes:
        id: of the key, once it lies in the owner's folder; empty before.
        awaited: what is not there yet, in words.
    """

    id: bytes
    awaited: str


def roster_of(path: Path) -> dict[str, bytes]:
    """The identities in a file that has a line ``NAME KEY`` for every silo, this one too.

    Raises:
        ConfigurationError: a line is none; tells which.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "roster.txt"
        >>> _ = path.write_text("# told by telephone\\nBasel " + "ab" * 32)
        >>> list(roster_of(path))
        ['Basel']
    """
    found: dict[str, bytes] = {}
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the roster {path} cannot be read: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        sound = len(words) == 2 and re.fullmatch(r"[\w-]{1,40}", words[0], re.ASCII) and words[0] not in found
        if not sound or not re.fullmatch(r"[0-9a-fA-F]{64}", words[1]):
            raise ConfigurationError(
                f"{path}, line {number}: a line is a silo's name (letters, digits, - and _) and the 64 hexadecimal "
                f"digits of its identity (foedus silos identity), each silo once; not {line[:80]!r}"
            )
        found[words[0]] = bytes.fromhex(words[1])
    return found


def agree(owner: OwnerFolder, shared: Path, *, name: str, roster: Mapping[str, bytes], session: str) -> Agreement:
    """Do what can be done by now.

    Args:
        owner: where this silo's secrets are, and the key will be.
        shared: the folder with everybody's files.
        name: this silo's, in the roster.
        roster: the public identity of every silo by name.
        session: tells this agreement from any other, and is the same for all.

    Raises:
        ConfigurationError: the roster does not fit, a file is not what its name says, or there is another key already.
        ForgedMessage: something is not by whom it says.
        SecureAggregationFailed: two silos were given different keys.
    """
    if name not in roster:
        raise ConfigurationError(f"{name!r} is not in the roster, which names {', '.join(sorted(roster)) or 'nobody'}")
    number = hashlib.sha256(session.encode()).hexdigest()[:16]
    secrets, agreed = owner.path / f"silo-{number}", owner.path / f"agreed-{number}"
    if done := _done(owner, shared, name, agreed):
        return done
    private_folder(owner.path)
    create_once(_fresh(secrets), os.urandom(KEY))
    silo = Silo(
        name, identity=own_secret(owner.path), roster=roster, session=session.encode(),
        fresh=read_secret(_fresh(secrets)),
    )  # fmt: skip
    step = _Step(owner, shared, silo, secrets, agreed, tuple(sorted(roster)))
    try:
        return step.taken()
    except (ForgedMessage, SecureAggregationFailed) as error:
        raise type(error)(
            f"{error}. It lies in {shared}, as NAME.offer, NAME.wrapped or NAME.receipt: have it sent again by who "
            "wrote it, and move files of an earlier agreement away"
        ) from None


class _Step(NamedTuple):
    """One run of the command."""

    owner: OwnerFolder
    shared: Path
    silo: Silo
    secrets: Path
    agreed: Path
    names: tuple[str, ...]

    def taken(self) -> Agreement:
        silo, name = self.silo, self.silo.name
        _write(self.shared / f"{name}.offer", silo.offer())
        offers = self._all(Offer)
        if missing := self._missing(offers):
            return Agreement(b"", f"the offers of {missing}")
        if name == silo.maker:
            key = self._made()
            for other, wrapped in silo.wrap(key, offers).items():
                _write(self.shared / f"{other}.wrapped", wrapped)
        elif (wrapped_ := _read(self.shared / f"{name}.wrapped", Wrapped)) is None:
            return Agreement(b"", f"the key, which {silo.maker} makes")
        else:
            key = silo.unwrap(wrapped_, offers)
        _write(self.shared / f"{name}.receipt", silo.receipt(key, offers))
        receipts = self._all(Receipt)
        if missing := self._missing(receipts):
            return Agreement(b"", f"the receipts of {missing}")
        silo.check(key, receipts, offers)
        return self._kept(key)

    def _all(self, kind: type[Told]) -> dict[str, Told]:
        """What is there of a kind, by silo."""
        ending = kind.__name__.lower()
        read = {name: _read(self.shared / f"{name}.{ending}", kind) for name in self.names}
        return {name: found for name, found in read.items() if found is not None}

    def _missing(self, found: Mapping[str, object]) -> str:
        return ", ".join(name for name in self.names if name not in found)

    def _made(self) -> SiloKey:
        """The key that this silo makes; the same one however often it is asked."""
        path = self.secrets.with_suffix(".made")
        if not path.exists():
            create_once(path, bytes(silo_key()))
        return SiloKey(read_secret(path))

    def _kept(self, key: SiloKey) -> Agreement:
        if self.owner.silo_key.exists():
            raise ConfigurationError(
                f"all have the key {key.id.hex()}, and another lies at {self.owner.silo_key}. Move that away if no "
                "federation needs it any more, and run the command again"
            )
        name, others = self.silo.name, self.names if self.silo.name == self.silo.maker else ()
        own = [f"{name}.offer", f"{name}.receipt", *(f"{other}.wrapped" for other in others if other != name)]
        with storage(self.agreed):
            for file in own:
                private_folder(self.agreed)
                replace(self.agreed / file, (self.shared / file).read_bytes())
        write_secret(self.owner.silo_key, bytes(key))
        with storage(self.secrets):
            for path in (_fresh(self.secrets), self.secrets.with_suffix(".made")):
                path.unlink(missing_ok=True)
        return Agreement(key.id, "")


def _done(owner: OwnerFolder, shared: Path, name: str, agreed: Path) -> Agreement | None:
    """Whether the key that this silo has given a receipt for lies in its place; then what it wrote is put back for
    others who may still need it."""
    receipt = _read(agreed / f"{name}.receipt", Receipt)
    if receipt is None or not owner.silo_key.exists():
        return None
    key = SiloKey(read_secret(owner.silo_key))
    if key.id != receipt.id:
        return None
    with storage(shared):
        shared.mkdir(parents=True, exist_ok=True)
        for path in agreed.iterdir():
            if not (shared / path.name).exists():
                replace(shared / path.name, path.read_bytes())
    return Agreement(key.id, "")


def _fresh(secrets: Path) -> Path:
    return secrets.with_suffix(".fresh")


def _write(path: Path, told: Offer | Wrapped | Receipt) -> None:
    plain = {name: value.hex() if isinstance(value, bytes) else value for name, value in told._asdict().items()}
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(plain).encode())


def _read(path: Path, kind: type[Told]) -> Told | None:
    """What a file says, which anybody may have written; ``None`` if there is none."""
    if not path.exists():
        return None
    with storage(path), path.open("rb") as file:
        content = file.read(LONGEST + 1)
    try:
        given: Any = json.loads(content) if len(content) <= LONGEST else {}
        fields: dict[str, Any] = {name: _field(name, given[name]) for name in kind._fields}
        return kind(**fields)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigurationError(
            f"{path} is no {kind.__name__.lower()} of a silo's: it was damaged on its way, or written by something "
            "else. Have it sent again"
        ) from None


def _field(name: str, value: Any) -> str | bytes:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError
    return value if name in TEXTS else bytes.fromhex(value)

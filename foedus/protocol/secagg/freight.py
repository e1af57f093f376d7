"""The conversation's messages as blobs, and back; and the terms, with the slot of the client that they are for.

A blob's ``kind`` names the message; fields that are bytes or arrays lie in it as bytes (uint8), numbers as texts beside
them, and the terms' channels as JSON: ``[["update", 1000, 26], ...]``.

What comes may be from anybody: names, types and numbers of axes are checked here, shapes by who takes it.

Not here: the layout of the bytes (``protocol/blob.py``), what is meant (``messages.py``).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from foedus.errors import MalformedMessage
from foedus.protocol import blob
from foedus.protocol.secagg.messages import (
    Channel,
    Delivery,
    FromClient,
    FromServer,
    Keys,
    Masked,
    Parcels,
    Roster,
    Shares,
    Survivors,
    Terms,
    Vote,
    Votes,
)

TURNS: tuple[type[Any], ...] = (Terms, Roster, Delivery, Survivors, Votes)
ANSWERS: tuple[type[Any], ...] = (Keys, Parcels, Masked, Shares, Vote)
_KINDS = {kind.__name__: kind for kind in (*TURNS, *ANSWERS)}
_LARGEST = 2**53
_CHANNELS = 64  # at most, in one conversation


class Invited(NamedTuple):
    """The server's first turn: what the attempt is about, and which slot the client has in it."""

    terms: Terms
    slot: int


def message_blob(message: FromClient | FromServer, *, slot: int | None = None) -> bytes:
    """A message as bytes; a server's turn with the slot that it is for, so that no two are the same bytes.

    Example:
        >>> vote_ = Vote(bytes(64))
        >>> message_of(message_blob(vote_), (Vote,)) == vote_
        True
    """
    return _packed(message, {} if slot is None else {"slot": str(slot)})


def invitation_blob(invited: Invited) -> bytes:
    """The first turn as bytes."""
    return _packed(invited.terms, {"slot": str(invited.slot)})


def message_of(content: bytes | memoryview, kinds: tuple[type[Any], ...]) -> Any:
    """The message that a blob holds.

    Args:
        content: the blob.
        kinds: what it may be.

    Raises:
        MalformedMessage: it is none of these; says how.
    """
    given = blob.unpack(content)
    kind = _KINDS.get(given.told.get("kind", ""))
    if kind is None or kind not in kinds:
        wanted = ", ".join(k.__name__ for k in kinds)
        raise MalformedMessage(f"this blob is no {wanted}: it calls itself {given.told.get('kind', '')[:40]!r}")
    return kind(**{name: _field(given, name, type_) for name, type_ in get_type_hints(kind).items()})


def invited_by(content: bytes | memoryview) -> Invited:
    """The first turn that a blob holds.

    Raises:
        MalformedMessage: it is none.
    """
    terms = message_of(content, (Terms,))
    return Invited(terms, _whole(blob.unpack(content).told.get("slot"), "slot"))


def _packed(message: Any, more: dict[str, str]) -> bytes:
    arrays: dict[str, Any] = {}
    told = {"kind": type(message).__name__, **more}
    for name, value in message._asdict().items():
        if isinstance(value, bytes):
            arrays[name] = np.frombuffer(value, np.uint8)
        elif isinstance(value, int):
            told[name] = str(int(value))
        elif isinstance(value, tuple):
            told[name] = json.dumps(value)
        else:
            arrays[name] = value
    return blob.pack(arrays, told)


def _field(given: blob.Tensors, name: str, type_: Any) -> Any:
    if type_ is int:
        return _whole(given.told.get(name), name)
    if type_ is bool:
        return bool(_whole(given.told.get(name), name))
    if type_ == tuple[Channel, ...]:
        return _channels(given.told.get(name, ""))
    array = given.arrays.get(name)
    if array is None or array.dtype != np.uint8 or array.ndim > 2:
        raise MalformedMessage(f"malformed {name}: bytes are expected")
    if type_ is bytes:
        if array.ndim != 1 or array.size > 1 << 16:
            raise MalformedMessage(f"malformed {name}: some bytes in a row are expected")
        return array.tobytes()
    return array


def _channels(text: str) -> tuple[Channel, ...]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not 1 <= len(found) <= _CHANNELS or not all(map(_is_channel, found)):
        raise MalformedMessage(f"malformed channels: from 1 to {_CHANNELS} of name, entries and width are expected")
    return tuple(Channel(*each) for each in found)


def _is_channel(each: Any) -> bool:
    if not isinstance(each, list) or len(each) != 3 or not isinstance(each[0], str):
        return False
    name, entries, width = each
    whole = type(entries) is int and type(width) is int
    return whole and len(name) <= 128 and name.isprintable() and 0 <= entries <= _LARGEST and 1 <= width <= 64


def _whole(text: str | None, name: str) -> int:
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 16 or int(text) > _LARGEST:
        raise MalformedMessage(f"malformed {name}: it is no whole number from 0 to {_LARGEST}")
    return int(text)

"""Messages ↔ bytes: MessagePack, with version and kind before the fields, read strictly.

A message is the array ``[major, minor, kind, fields]``; ``fields`` is a map by name. Everything is checked against the
types and bounds of ``messages.py``: whoever writes is held to them like whoever reads. A field that is missing takes
its default if it has one; a field that nobody knows is ignored if the writer's minor version is later than the one
that we know, and is malformed otherwise. Size is checked before anything is parsed, and lengths while parsing.

Not here: tensors (``blob.py``), the meaning of messages (``messages.py``, docs/protocol.md).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from foedus.errors import MalformedMessage, MissingExtra, TooLarge, WrongVersion
from foedus.protocol.messages import KINDS, Long, Message, Within

MOST = 1 << 16  # bytes of a message: a thousand keys, with room to spare
_NAMES: dict[type, str] = {kind: name for name, kind in KINDS.items()}


class Version(NamedTuple):
    """Minor versions add fields with defaults; a major version may change anything."""

    major: int
    minor: int


SERVED = {1: 0}  # major versions that are spoken, and of each the latest minor version that we know
OURS = Version(1, SERVED[1])


def encode(message: Message, *, major: int | None = None) -> bytes:
    """A message as bytes; the same bytes for the same message.

    Args:
        message: what to say.
        major: the version that the other side speaks; by default ours.

    Raises:
        MalformedMessage: a field is of the wrong type, or out of its bounds.

    Example:
        >>> from foedus.protocol.messages import Later
        >>> len(encode(Later(after_s=60.0, until_s=90.0)))
        52
    """
    kind = _NAMES[type(message)]
    stamp = OURS if major is None else Version(major, SERVED.get(major, 0))
    _check_served(stamp)
    data: bytes = _msgpack().packb([*stamp, kind, _written(kind, message)], use_bin_type=True)
    if len(data) > MOST:
        raise TooLarge(f"the message {kind!r} takes {len(data)} bytes, and {MOST} are let through; send fewer entries")
    return data


class Heard(NamedTuple):
    """A message, and the version that its writer speaks: answer in it."""

    message: Message
    version: Version


def decode(data: bytes | memoryview) -> Message:
    """The message that some bytes are.

    Raises:
        TooLarge: there are more bytes than any message has.
        WrongVersion: they are of a version that is not served.
        MalformedMessage: they are no message; says where.

    Example:
        >>> from foedus.protocol.messages import Later
        >>> decode(encode(Later(after_s=60.0, until_s=90.0)))
        Later(after_s=60.0, until_s=90.0, reason='')
        >>> decode(b"hello")
        Traceback (most recent call last):
        foedus.errors.MalformedMessage: no message: these bytes are not MessagePack (ExtraData)
    """
    return hear(data).message


def hear(data: bytes | memoryview) -> Heard:
    """As :func:`decode`, with the writer's version."""
    if len(data) > MOST:
        raise TooLarge(f"a message of {len(data)} bytes came, and {MOST} are let in")
    major, minor, kind, given = _opened(_parsed(data))
    version = Version(major, minor)
    _check_served(version)
    if kind not in KINDS:
        raise MalformedMessage(f"no message: its kind is {kind[:40]!r}, and there are {', '.join(KINDS)}")
    message: Message = _Reading(minor > SERVED[major]).record(KINDS[kind], given, kind)
    return Heard(message, version)


def _check_served(version: Version) -> None:
    if version.major not in SERVED:
        raise WrongVersion(
            f"version {version.major}.{version.minor} of the protocol is not spoken here; spoken are the major "
            f"versions {', '.join(map(str, SERVED))}. Install the foedus that the other side has"
        )


# --- MessagePack ----------------------------------------------------------------------------------------------


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise MissingExtra("msgpack", "net", "To speak with other machines") from error
    return msgpack


def _parsed(data: bytes | memoryview) -> Any:
    msgpack = _msgpack()
    try:
        return msgpack.unpackb(
            data, raw=False, use_list=False, strict_map_key=True, object_pairs_hook=_once,
            max_str_len=4096, max_bin_len=4096, max_array_len=1024, max_map_len=256, max_ext_len=0,
        )  # fmt: skip
    except (ValueError, msgpack.UnpackException, OverflowError) as error:
        raise MalformedMessage(f"no message: these bytes are not MessagePack ({type(error).__name__})") from None


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map has a key twice")
    return found


def _opened(value: Any) -> tuple[int, int, str, dict[str, Any]]:
    """The four parts of the envelope."""
    if not (isinstance(value, tuple) and len(value) == 4):
        raise MalformedMessage("no message: messages are arrays of major version, minor version, kind, fields")
    major, minor, kind, given = value
    whole = all(type(n) is int and 0 <= n < 1 << 16 for n in (major, minor))
    if not (whole and isinstance(kind, str) and isinstance(given, dict)):
        raise MalformedMessage("no message: messages are arrays of major version, minor version, kind, fields")
    return major, minor, kind, given


# --- types and bounds -----------------------------------------------------------------------------------------


class _Slot(NamedTuple):
    """A field of a message: its type with bounds, and its default (``MISSING`` if it must be given)."""

    type: Any
    default: Callable[[], Any] | None


@cache
def _slots(kind: type[Any]) -> dict[str, _Slot]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: _Slot(hints[f.name], _default(f)) for f in fields(kind)}


def _default(field: Any) -> Callable[[], Any] | None:
    if field.default is not MISSING:
        return lambda: field.default
    factory: Callable[[], Any] | None = None if field.default_factory is MISSING else field.default_factory
    return factory


class _Reading(NamedTuple):
    """How messages are read: whether their writer may know more than we do."""

    later: bool

    def record(self, kind: type, given: Any, path: str) -> Any:
        """A message, or a value within one, of its fields by name."""
        if not isinstance(given, dict):
            raise _wrong(path, given, "a map of fields")
        slots = _slots(kind)
        if (unknown := given.keys() - slots.keys()) and not self.later:
            raise MalformedMessage(f"malformed {path}: it has no field {min(map(str, unknown))[:40]!r}")
        values = {}
        for name, slot in slots.items():
            if name in given:
                values[name] = self.value(slot.type, given[name], f"{path}.{name}")
            elif slot.default is None:
                raise MalformedMessage(f"malformed {path}: the field {name!r} is missing")
        return kind(**values)

    def value(self, kind: Any, given: Any, path: str) -> Any:
        """One value of a type."""
        bound = None
        if get_origin(kind) is Annotated:
            kind, bound = get_args(kind)
        origin, inner = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            rest = next(t for t in inner if t is not type(None))
            return None if given is None else self.value(rest, given, path)
        if origin is tuple:
            found: Any = self._entries(inner[0], given, path, bound)
        elif origin is Mapping:
            found = self._mapping(inner, given, path, bound)
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            found = _listed(kind, given, path)
        elif kind in _PLAIN:
            found = _PLAIN[kind](given, path, bound)
        else:
            found = self.record(kind, given, path)
        return found

    def _entries(self, kind: Any, given: Any, path: str, bound: Any) -> tuple[Any, ...]:
        if not isinstance(given, tuple):
            raise _wrong(path, given, "an array")
        _check_long(given, path, bound)
        return tuple(self.value(kind, one, f"{path}[{i}]") for i, one in enumerate(given))

    def _mapping(self, kinds: tuple[Any, ...], given: Any, path: str, bound: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise _wrong(path, given, "a map")
        _check_long(given, path, bound)
        return {self.value(kinds[0], k, path): self.value(kinds[1], v, path) for k, v in given.items()}


def _whole(given: Any, path: str, bound: Any) -> int:
    if type(given) is not int:
        raise _wrong(path, given, "a whole number")
    _check_within(given, path, bound)
    return given


def _real(given: Any, path: str, bound: Any) -> float:
    if type(given) not in (int, float) or not math.isfinite(given):
        raise _wrong(path, given, "a finite number")
    _check_within(given, path, bound)
    return float(given)


def _truth(given: Any, path: str, bound: Any) -> bool:
    if type(given) is not bool:
        raise _wrong(path, given, "true or false")
    return given


def _text(given: Any, path: str, bound: Any) -> str:
    if not isinstance(given, str):
        raise _wrong(path, given, "a text")
    _check_long(given, path, bound)
    if not given.isprintable():
        raise MalformedMessage(f"malformed {path}: it has characters that cannot be printed")
    return str(given)


def _bytes(given: Any, path: str, bound: Any) -> bytes:
    if not isinstance(given, bytes):
        raise _wrong(path, given, "bytes")
    _check_long(given, path, bound)
    return given


_PLAIN: dict[Any, Callable[[Any, str, Any], Any]] = {
    int: _whole, float: _real, bool: _truth, str: _text, bytes: _bytes,
}  # fmt: skip


def _listed(kind: type[StrEnum], given: Any, path: str) -> StrEnum:
    try:
        return kind(_text(given, path, Long(0, 128)))
    except ValueError:
        raise MalformedMessage(f"malformed {path}: it is {str(given)[:40]!r}, and may be {', '.join(kind)}") from None


def _check_within(value: float, path: str, bound: Within | None) -> None:
    if bound is not None and not bound.low <= value <= bound.high:
        raise MalformedMessage(f"malformed {path}: it is {value}, and goes from {bound.low} to {bound.high}")


def _check_long(value: Any, path: str, bound: Long | None) -> None:
    if bound is not None and not bound.low <= len(value) <= bound.high:
        raise MalformedMessage(
            f"malformed {path}: its length is {len(value)}, and goes from {bound.low} to {bound.high}"
        )


def _wrong(path: str, given: Any, wanted: str) -> MalformedMessage:
    return MalformedMessage(f"malformed {path}: it is of type {type(given).__name__}, and should be {wanted}")


# --- writing --------------------------------------------------------------------------------------------------


def _written(path: str, value: Any) -> dict[str, Any]:
    """The fields of a message as plain values, read back so that nothing leaves that would be refused."""
    given = _plain(value)
    if (back := _Reading(False).record(type(value), given, path)) != value:
        raise MalformedMessage(f"malformed {path}: it reads back as {back}")
    assert isinstance(given, dict)
    return given


def _plain(value: Any) -> Any:
    if type(value) in _RECORDS:
        return {name: _plain(getattr(value, name)) for name in _slots(_kind(value))}
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    if isinstance(value, StrEnum):
        return str(value)
    return dict(value) if isinstance(value, Mapping) else value


def _kind(value: Any) -> type:  # mypy takes `type(value)` for something that has no hash
    return type(value)


def _records(kinds: Any) -> set[type]:
    """All the types of messages, and of the values within them."""
    found: set[type] = set()
    for kind in kinds:
        if isinstance(kind, type) and get_origin(kind) is None:
            if kind not in found and is_dataclass(kind):
                found |= {kind} | _records(slot.type for slot in _slots(kind).values())
        else:
            found |= _records(get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind))
    return found


_RECORDS = frozenset(_records(KINDS.values()))

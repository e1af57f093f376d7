"""The wire format of messages: what is written is read, and nothing else is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given, settings

from foedus.errors import Code, MalformedMessage, NotNow, ProtocolError, TooLarge, WrongVersion
from foedus.protocol import blob, wire
from foedus.protocol.messages import (
    ANSWERS,
    KINDS,
    Ask,
    Bell,
    CheckIn,
    Later,
    Message,
    Place,
    Problem,
    problem,
    raised,
    sentence,
)
from foedus.protocol.wire import MOST, OURS, decode, encode, hear

from .examples import EXAMPLES, KEY


def bytes_of(kind: Any = "later", fields: Any = None, version: tuple[Any, Any] = (1, 0)) -> bytes:
    given = {"after_s": 1.0, "until_s": 2.0} if fields is None else fields
    packed: bytes = msgpack.packb([*version, kind, given])
    return packed


def test_there_is_an_example_of_every_kind() -> None:
    assert [type(m) for m in EXAMPLES] == list(KINDS.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_what_is_written_is_read(message: Message) -> None:
    assert decode(encode(message)) == message
    assert encode(decode(encode(message))) == encode(message)


def test_every_request_has_its_answers() -> None:
    assert set(ANSWERS) | {a for found in ANSWERS.values() for a in found} | {Bell, Problem} == set(KINDS.values())


def test_a_field_that_is_missing_takes_its_default_or_is_told() -> None:
    assert decode(bytes_of()) == Later(after_s=1.0, until_s=2.0, reason="")
    with pytest.raises(MalformedMessage, match="the field 'until_s' is missing"):
        decode(bytes_of(fields={"after_s": 1.0}))


def test_fields_of_later_minor_versions_are_ignored_and_others_are_not() -> None:
    more = {"after_s": 1.0, "until_s": 2.0, "mood": "good"}
    heard = hear(bytes_of(fields=more, version=(1, OURS.minor + 1)))
    assert heard == (Later(after_s=1.0, until_s=2.0), (1, OURS.minor + 1))
    with pytest.raises(MalformedMessage, match="no field 'mood'"):
        decode(bytes_of(fields=more))


def test_major_versions_that_nobody_speaks_are_refused_by_name() -> None:
    with pytest.raises(WrongVersion, match=r"version 9\.0 of the protocol is not spoken here"):
        decode(bytes_of(version=(9, 0)))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"after_s": True, "until_s": 2.0}, "later.after_s: it is of type bool"),
        ({"after_s": float("nan"), "until_s": 2.0}, "should be a finite number"),
        ({"after_s": float("inf"), "until_s": 2.0}, "should be a finite number"),
        ({"after_s": -1.0, "until_s": 2.0}, "goes from 0 to"),
        ({"after_s": 1.0, "until_s": "2"}, "it is of type str"),
        ({"after_s": 1.0, "until_s": 2.0, "reason": b"x"}, "should be a text"),
        ({"after_s": 1.0, "until_s": 2.0, "reason": "x" * 1001}, "its length is 1001"),
        ({"after_s": 1.0, "until_s": 2.0, "reason": "a\x1b[31m"}, "cannot be printed"),
        ({"after_s": None, "until_s": 2.0}, "it is of type NoneType"),
        ({}, "the field 'after_s' is missing"),
    ],
)
def test_types_and_bounds_are_held(fields: Any, told: str) -> None:
    with pytest.raises(MalformedMessage, match=told):
        decode(bytes_of(fields=fields))


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        ("ask", {"keys": [b"short"]}, r"ask.keys\[0\]: its length is 5"),
        ("ask", {"keys": [KEY] * 1001}, "ask.keys: its length is 1001"),
        ("ask", {"keys": {}}, "should be an array"),
        ("check-in", {"kinds": []}, "check-in.kinds: its length is 0"),
        ("check-in", {"kinds": ["dance"]}, "it is 'dance', and may be train, evaluate, decrypt"),
        ("check-in", {"software": {"a": 1}}, "check-in.software: it is of type int"),
        ("check-in", {"software": [1]}, "should be a map"),
        ("check-in", {"examples": 2**60}, "goes from 0 to"),
        ("received", {"later": 3}, "should be a map of fields"),
        ("received", {"later": {"after_s": 1.0}}, "received.later: the field 'until_s' is missing"),
        ("place", {"upload": KEY, "chunk": 0}, "goes from 1 to"),
        ("place", {"upload": KEY, "scale": 1.5}, "goes from 0 to 1"),
        ("closed", {"why": "mood", "later": {"after_s": 1.0, "until_s": 2.0}}, "may be goal-reached, late"),
        ("dance", {}, "its kind is 'dance'"),
    ],
)
def test_so_are_those_of_other_kinds(kind: str, fields: Any, told: str) -> None:
    with pytest.raises(MalformedMessage, match=told):
        decode(bytes_of(kind, fields))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello", b"\xc1", msgpack.packb(5), msgpack.packb([1, 0, "later"]), msgpack.packb({"kind": "later"}),
        msgpack.packb([1, 0, 7, {}]), msgpack.packb([1, True, "later", {}]), msgpack.packb([1, -1, "later", {}]),
        msgpack.packb([1, 0, "later", []]), bytes_of() + b"\x00", bytes_of()[:-1],
        b"\x91" * 60000 + b"\x00",  # nested arrays
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",  # lengths
        b"\x94\x01\x00\xa5later\x82\xa1a\x01\xa1a\x02",  # a field twice
        msgpack.packb(msgpack.ExtType(5, b"")), msgpack.packb([1, 0, "later", {"a": msgpack.Timestamp(1)}]),
        b"\x94\x01\x00\xa5later\x81\x01\x02",  # a field whose name is a number
        b"\x94\x01\x00\xa5later\x81\xa2\xff\xfe\x02",  # a name that is no UTF-8
    ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


def test_a_message_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLarge, match=f"{MOST} are let in"):
        decode(bytes(MOST + 1))


def test_a_code_of_a_later_version_reads_as_other() -> None:
    assert decode(bytes_of("problem", {"code": "bad-hair-day"})) == Problem(code=Code.OTHER)


@pytest.mark.parametrize(
    "message",
    [Later(after_s=-1.0, until_s=0.0), Ask(keys=(b"x",)), CheckIn(run="x" * 200), Place(upload=KEY, scale=2.0)],
)
def test_nothing_is_written_that_would_not_be_read(message: Message) -> None:
    with pytest.raises(MalformedMessage):
        encode(message)


def test_a_problem_is_an_error_on_the_other_side() -> None:
    error = NotNow("ask\nonce a minute", code=Code.RATE, after_s=60.0)
    answer = decode(encode(problem(error)))
    assert answer == Problem(code=Code.RATE, told="ask once a minute", after_s=60.0)
    assert isinstance(answer, Problem)
    again = raised(answer)
    assert isinstance(again, NotNow)
    assert (again.code, again.fatal, again.after_s) == (Code.RATE, False, 60.0)


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_an_error_of_its_own_kind(code: Code) -> None:
    assert ProtocolError.of(code, "no").code is code


def test_sentences_fit_into_messages() -> None:
    assert decode(encode(Later(after_s=0.0, until_s=1.0, reason=sentence("a\n" * 5000))))


# --- version 1, for ever


VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "wire_v1.json").read_text("utf-8"))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_version_1_is_what_it_was(message: Message) -> None:
    """Bytes that were written by the first release; they are read for ever, and version 1 is written as it was."""
    data = bytes.fromhex(VECTORS["messages"][type(message).__name__])
    assert decode(data) == message
    assert encode(message, major=1) == data


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_server_of_version_2_serves_version_1(message: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SERVED", {1: 0, 2: 0})
    monkeypatch.setattr(wire, "OURS", wire.Version(2, 0))
    data = bytes.fromhex(VECTORS["messages"][type(message).__name__])
    heard = hear(data)
    assert heard == (message, (1, 0))
    assert encode(message, major=heard.version.major) == data
    assert hear(encode(message)).version == (2, 0)


def test_a_version_that_is_no_longer_served_is_not_written() -> None:
    with pytest.raises(WrongVersion):
        encode(EXAMPLES[0], major=7)


def test_blobs_of_version_1_are_what_they_were() -> None:
    for data, told in zip(map(bytes.fromhex, VECTORS["blobs"]), ({"kind": "vector", "round": "1"}, {}), strict=True):
        found = blob.unpack(data)
        assert found.told == told
        assert blob.pack(found.arrays, found.told) == data
    assert list(blob.unpack(bytes.fromhex(VECTORS["blobs"][0])).arrays) == ["vector", "counts", "mask"]


# --- fuzzing: messages that are nearly right


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_message_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(encode(data.draw(st.sampled_from(EXAMPLES))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    check(bytes(whole))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=400, deadline=None)
def test_a_message_with_a_strange_field_is_read_or_refused(message: Message, data: st.DataObject) -> None:
    major, minor, kind, fields = msgpack.unpackb(encode(message))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(plain)
    check(msgpack.packb([major, minor + data.draw(st.integers(0, 1)), kind, fields]))


def check(data: bytes) -> None:
    """Whatever is read can be written, and reads the same."""
    try:
        found = decode(data)
    except ProtocolError:
        return
    assert decode(encode(found)) == found

"""The cryptography is what the standards say, to the byte, and what does not verify raises."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.keystream import keystream
from foedus.errors import ForgedMessage
from foedus.secure.primitives import (
    Agreement,
    add_mask,
    check_public,
    check_signature,
    derived,
    digest,
    identity_key,
    opened,
    public_key,
    sealed,
    signed,
)

keys = st.binary(min_size=32, max_size=32)
RFC_8032 = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")  # section 7.1, test 1


def test_key_agreement_is_that_of_rfc_7748() -> None:
    """Section 5.2, the first vector."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert Agreement(scalar).secret(point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


def test_derived_keys_are_those_of_rfc_5869() -> None:
    """Test case 3, the first 32 bytes."""
    assert derived(b"\x0b" * 22, b"").hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_masks_are_the_keystream_of_aes_256_in_counter_mode() -> None:
    """AES-256 of the zero block under the zero key (NIST's known answers)."""
    assert keystream(bytes(32), 16).hex() == "dc95c078a2408989ad48a21492842087"
    words = np.zeros(4, np.uint32)
    add_mask([words], bytes(32))
    assert words.tobytes() == keystream(bytes(32), 16)


def test_seals_are_those_of_the_gcm_specification() -> None:
    """McGrew & Viega, test cases 13 and 14."""
    assert sealed(bytes(32), b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    assert sealed(bytes(32), bytes(16), b"").hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"


def test_signatures_are_those_of_rfc_8032() -> None:
    assert identity_key(RFC_8032).hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert signed(RFC_8032, b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155")


@given(keys, st.integers(0, 200_000), st.sampled_from([np.uint16, np.uint32, np.uint64]))
def test_a_mask_is_its_whole_keystream_and_comes_off_again(key: bytes, count: int, kind: type) -> None:
    """Over the borders of chunks, too: no seed is cut short, and no part of the stream used twice."""
    words = np.arange(count).astype(kind)
    before = words.copy()
    add_mask([words], key)
    stream = np.frombuffer(keystream(key, words.nbytes), words.dtype)
    assert (words == before + stream).all()
    add_mask([words], key, negative=True)
    assert (words == before).all()


@given(keys, st.lists(st.tuples(st.integers(0, 70_000), st.sampled_from(["u2", "u4", "u8"])), max_size=4))
def test_the_mask_of_several_vectors_is_one_stream_read_on(key: bytes, sizes: list[tuple[int, str]]) -> None:
    vectors = [np.zeros(count, kind) for count, kind in sizes]
    add_mask(vectors, key)
    whole = b"".join(vector.tobytes() for vector in vectors)
    assert whole == keystream(key, len(whole))


@given(keys, keys)
def test_both_ends_agree_and_every_purpose_has_a_key_of_its_own(one: bytes, other: bytes) -> None:
    there, back = Agreement(one).secret(public_key(other)), Agreement(other).secret(public_key(one))
    assert there == back
    assert len({derived(there, b"a"), derived(there, b"b"), there}) == 3


def test_all_of_a_seed_counts() -> None:
    """A public report against another system: 256-bit seeds folded to 32 bits before they made masks."""
    streams = set()
    for bit in range(256):
        streams.add(keystream((1 << bit).to_bytes(32, "little"), 32))
    assert len(streams) == 256


@given(keys, st.binary(max_size=80), st.binary(max_size=40), st.data())
def test_a_seal_opens_only_unchanged_with_its_key_and_for_its_context(
    key: bytes, message: bytes, context: bytes, data: st.DataObject
) -> None:
    closed = sealed(key, message, context)
    assert opened(key, closed, context) == message
    at = data.draw(st.integers(0, len(closed) - 1))
    changed = bytearray(closed)
    changed[at] ^= data.draw(st.integers(1, 255))
    for wrong in (
        (key, bytes(changed), context),
        (derived(key, b"other"), closed, context),
        (key, closed, context + b"!"),
        (key, closed[:-1], context),
        (key, b"", context),
    ):
        with pytest.raises(ForgedMessage, match="does not open"):
            opened(*wrong)


def test_public_keys_with_which_every_secret_is_the_same_are_refused() -> None:
    for point in (0, 1):
        with pytest.raises(ForgedMessage, match="none that a client makes"):
            Agreement(bytes(range(32))).secret(point.to_bytes(32, "little"))


def test_the_quick_look_at_public_keys_finds_those_with_which_nothing_can_be_agreed() -> None:
    from foedus.secure.primitives import _LOW_ORDER

    for point in _LOW_ORDER:
        for high in (0, 1 << 255):
            public = (point | high).to_bytes(32, "little")
            with pytest.raises(ForgedMessage):
                Agreement(RFC_8032).secret(public)
            with pytest.raises(ForgedMessage):
                check_public(public)
    assert len(_LOW_ORDER) == 7


@given(keys)
def test_other_public_keys_pass(key: bytes) -> None:
    check_public(public_key(key))


def test_a_signature_of_another_message_or_key_raises() -> None:
    public, good = identity_key(RFC_8032), signed(RFC_8032, b"set")
    check_signature(public, good, b"set")
    for wrong in ((public, good, b"sets"), (identity_key(bytes(32)), good, b"set"), (public, good[:-1], b"set"),
                  (public, bytes(64), b"set"), (b"short", good, b"set")):  # fmt: skip
        with pytest.raises(ForgedMessage):
            check_signature(*wrong)


def test_digests_tell_where_parts_end() -> None:
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"", b"abc")}) == 4


def test_secrets_are_not_shown() -> None:
    assert "secret" in repr(Agreement(RFC_8032))
    assert RFC_8032.hex()[:8] not in repr(Agreement(RFC_8032))

"""Uploads under way: bytes in whatever pieces, their digest, and memory that is used again."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.net.uploads import IDLE, Uploads


@given(
    content=st.binary(min_size=1, max_size=200), cuts=st.lists(st.integers(0, 200)), looks=st.lists(st.integers(0, 200))
)
def test_the_digest_is_that_of_the_bytes_however_they_came(content: bytes, cuts: list[int], looks: list[int]) -> None:
    uploads = Uploads()
    uploads.open(b"a", len(content), owner=1, now=0.0)
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    for begin, end in itertools.pairwise(edges):
        uploads.write(b"a", max(0, begin - 3), content[max(0, begin - 3) : end], owner=1, now=0.0)  # some of it twice
        if end in looks:
            uploads.digested(b"a")
    assert uploads.digest(b"a") == hashlib.sha256(content).digest()
    assert bytes(uploads.whole(b"a")) == content


def test_memory_is_used_again_unless_somebody_still_looks_at_it() -> None:
    uploads = Uploads()
    kept: list[np.ndarray] = []
    for round in range(40):
        name, content = bytes([round]), bytes([round]) * 64
        uploads.open(name, 64, owner=1, now=0.0)
        uploads.write(name, 0, content, owner=1, now=0.0)
        view = np.frombuffer(uploads.whole(name), np.uint8)
        if round % 3 == 0:
            kept.append(view[10:20])
        del view
        uploads.drop(name)
    assert [set(view.tolist()) for view in kept] == [{round} for round in range(0, 40, 3)]


def test_a_place_given_up_leaves_no_memory_behind() -> None:
    uploads = Uploads()
    uploads.open(b"a", 64, owner=1, now=0.0)
    assert uploads.tidy(now=IDLE + 1) == [b"a"]
    assert not uploads._spare
    assert not uploads.taken


def test_a_place_that_is_gone_has_no_digest() -> None:
    uploads = Uploads()
    uploads.digested(b"a")  # given up while its bytes were waiting to be digested
    with pytest.raises(Exception, match="ask for a place first"):
        uploads.digest(b"a")
